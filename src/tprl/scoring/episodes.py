"""What the LVLM makes of every state of pruning episodes: the numbers that rewards are made of."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.pruners.learned import LearnedPruner
from tprl.rl.rollout import Rollout
from tprl.scoring.flops import question_flops
from tprl.scoring.scorer import FIDELITY, LABELS, Scorer
from tprl.types import Encoded, Outcome, Sample, TokenSelection


@torch.no_grad()
def measure_episodes(
    scorer: Scorer,
    pruner: LearnedPruner,
    needs: Collection[str],
    samples: Sequence[Sample],
    encoded: Encoded,
    rows: Sequence[int],
    rollout: Rollout,
) -> Outcome:
    """The fields `needs` of an Outcome. Episode i is about question `rows[i]`; its state 0 has all
    tokens."""
    needs, fields = set(needs), dict[str, Tensor]()
    # [T + 1 B]: row 0 has all tokens, row t what step t has left.
    kept = torch.stack([rollout.alive[0].sum(1), *(action.sum(1) for action in rollout.keep)])
    steps, keep = len(rollout.action), rollout.keep.flatten(0, 1)
    core = None if rollout.core is None else rollout.core.flatten(0, 1)
    asked, states = [*rows] * steps, (steps, len(rows))
    # Scores against answers; those with all tokens are measured once per question.
    if needs & LABELS:
        full = scorer.full(samples, encoded)
        scored = scorer.selections(samples, encoded, asked, keep, core)
        log_prob, score = full.log_prob[rows].unsqueeze(0), full.score[rows].unsqueeze(0)
        fields["log_prob"] = torch.cat([log_prob, scored.log_prob.view(states)])
        if "score" in needs:
            fields["score"] = torch.cat([score, scored.score.view(states)])
    # Agreement with the model's own answers needs no label; row 0 agrees by definition.
    if needs & FIDELITY:
        kl, same = scorer.fidelities(encoded, asked, keep, core)
        none, every = torch.zeros_like(kl[: len(rows)]), torch.ones_like(same[: len(rows)])
        fields["answer_kl"] = torch.cat([none, kl]).view(-1, len(rows))
        fields["agreement"] = torch.cat([every, same]).view(-1, len(rows))
    if "flops" in needs:
        fields["flops"] = flops_of_states(
            scorer, pruner, [samples[i] for i in rows], encoded.rows(rows), rollout
        )
    return Outcome(uids=tuple(encoded.uids[i] for i in rows), kept=kept, **fields)


def flops_of_states(
    scorer: Scorer,
    pruner: LearnedPruner,
    samples: Sequence[Sample],
    encoded: Encoded,
    rollout: Rollout,
) -> Float[Tensor, "T1 B"]:
    """FLOPs of each question in every state, the selector included once it has acted."""
    states = [TokenSelection(action).per_image(encoded) for action in rollout.keep]
    rows: list[list[float]] = [[] for _ in range(len(states) + 1)]
    for t, kept in enumerate(states):
        for i, sample in enumerate(samples):
            # State 0 has all tokens: its cost is the unpruned one, the same in every state.
            cost, whole = question_flops(scorer, encoded, i, sample, pruner, kept[i])
            rows[t + 1].append(cost)
            if t == 0:
                rows[0].append(whole)
    return torch.tensor(rows, device=encoded.embeds.device)
