"""The whole method on one page: a policy learns which 2 of 24 visual tokens a question needs.

    PYTHONPATH=src python examples/ppo_minimal.py

Ten seconds on one CPU core. The toy model answers right if the one token that decides the question
is still in its prompt. Letters: B questions, G episodes per question, V visual tokens, N = B G.
"""

import torch
from torch import Tensor

from tprl.budget import budgets
from tprl.data.toy import ToyDataset
from tprl.lvlm.toy import ToyLVLM
from tprl.policy.action import ActionRule, act, serve
from tprl.policy.dpp import unit_features
from tprl.policy.networks import PolicyInput, PolicyNet, places
from tprl.policy.sequential import log_stay
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.rewards.log_likelihood import LogLikelihood
from tprl.rl.gae import leave_one_out
from tprl.rl.ppo import normalize, ppo_loss
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Outcome, Sample, TokenSelection

LVLM, TRAIN, TEST = ToyLVLM(), ToyDataset("train"), ToyDataset("test", limit=600)
KEEP_RATIO, GROUP, QUESTIONS = 1 / 12, 8, 32
# tokens one after the other, in proportion to their gain of a determinant
RULE = ActionRule("sequential")


def questions(step: int) -> list[Sample]:
    """Those of a training step; every step has others."""
    return [TRAIN[step * QUESTIONS + i] for i in range(QUESTIONS)]


def observe(encoded: Encoded) -> PolicyInput:
    """What the policy sees: tokens, their places, and the words of the question."""
    # The toy's tokens are small enough to be their own codes; a real model's go through the
    # autoencoder first.
    query, query_mask = encoded.words
    codes, mask = encoded.visual, encoded.visual_mask
    return PolicyInput(codes, places(encoded), mask, query, query_mask, unit_features(codes, mask))


def logits_of(policy: PolicyNet, x: PolicyInput) -> Tensor:
    """One keep logit per token, [B V]."""
    return policy(x, x.mask, 0, torch.full((len(x.mask),), KEEP_RATIO))[0]


def score(samples: list[Sample], encoded: Encoded, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the right answer, and whether the model gives it, from the kept tokens."""
    # Tokens disappear in one pure function: the prompt really gets shorter.
    prompt = splice(encoded, TokenSelection(keep))
    return LVLM.score(prompt, [sample.answers[0] for sample in samples])


def imitate(policy: PolicyNet, steps: int) -> None:
    """Learning from demonstrations: make the sets of a rule without learning likely."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    teacher, generator = AttentionDPPPruner(), torch.Generator().manual_seed(0)
    for step in range(steps):
        encoded = LVLM.encode(questions(step), teacher.extras)
        x, members = observe(encoded), teacher.select(encoded, KEEP_RATIO).keep
        assert x.features is not None  # `observe` makes them
        # A set has no order. Draw one: how likely does the policy stay inside at each draw?
        noise = torch.rand(QUESTIONS, 1, x.mask.shape[1], generator=generator)
        quality = RULE.quality * logits_of(policy, x)
        stay = log_stay(quality, x.features, x.mask, members, 1.0, noise)
        loss = -stay.sum(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def improve(policy: PolicyNet, iterations: int) -> None:
    """PPO: sample sets, let the frozen model read them, make the better ones likelier."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3, eps=1e-5)
    generator, reward = torch.Generator().manual_seed(1), LogLikelihood()
    for iteration in range(iterations):
        # Fresh questions, encoded once; everything below shares the encoding.
        samples = questions(1000 + iteration)
        encoded = LVLM.encode(samples)
        x = observe(encoded)
        limits = {"k": budgets(KEEP_RATIO, x.mask), "features": x.features}

        # Rollout: G sets per question. `action` [B G V] is each token's place in order of drawing.
        with torch.no_grad():
            noise = torch.rand(QUESTIONS, GROUP, x.mask.shape[1], generator=generator)
            action, old, _ = act(logits_of(policy, x), x.mask, RULE, 0, **limits, noise=noise)
        keep = action.flatten(0, 1) > 0  # [N V]

        # Reward [N]: what pruning changes of the answer's log-probability with all tokens.
        rows = [i for i in range(QUESTIONS) for _ in range(GROUP)]
        full, _ = score(samples, encoded, keep_all(encoded).keep)
        pruned, _ = score([samples[i] for i in rows], encoded.rows(rows), keep)
        log_prob = torch.stack([full[rows], pruned])  # [T + 1, N]: row 0 has all tokens
        kept = torch.stack([x.mask[rows].sum(1), keep.sum(1)])
        uids = tuple(encoded.uids[i] for i in rows)
        returns = reward(Outcome(uids, kept, log_prob=log_prob)).sum(0)

        # Advantage [N]: against the other episodes of the question, so no critic is needed.
        advantage = normalize(leave_one_out(returns, GROUP))

        # Update: the same `act` evaluates the stored sets, so the first ratio is exactly 1.
        for _ in range(4):
            logits = logits_of(policy, x)
            _, new, entropy = act(logits, x.mask, RULE, 0, **limits, action=action)
            new, before, entropy = (part.flatten(0, 1) for part in (new, old, entropy))
            loss = ppo_loss(new, before, advantage, entropy, None, None, keep, entropy_coef=0.0)
            optimizer.zero_grad()
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


@torch.no_grad()
def report(policy: PolicyNet) -> dict[str, float]:
    """Accuracy on test questions: all tokens, a rule without learning, the policy's greedy sets."""
    samples, rule = [TEST[i] for i in range(len(TEST))], AttentionDPPPruner()
    encoded = LVLM.encode(samples, rule.extras)
    x, k = observe(encoded), budgets(KEEP_RATIO, encoded.visual_mask)
    sets = {
        "all tokens": keep_all(encoded).keep,
        "attention_dpp, no learning": rule.select(encoded, KEEP_RATIO).keep,
        "policy": serve(logits_of(policy, x), x.mask, k, "dpp", features=x.features),
    }
    right = {name: score(samples, encoded, keep)[1] for name, keep in sets.items()}
    return {name: float(answers.float().mean()) for name, answers in right.items()}


def main(demonstrations: int = 20, iterations: int = 60) -> dict[str, float]:
    """Accuracy before and after each stage."""
    torch.manual_seed(0)
    policy = PolicyNet(LVLM.width, LVLM.width, width=32, layers=1, heads=2, max_steps=1)
    result = report(policy)
    result["policy, untrained"] = result.pop("policy")
    imitate(policy, demonstrations)
    result["policy, demonstrations"] = report(policy)["policy"]
    improve(policy, iterations)
    result["policy, PPO"] = report(policy)["policy"]
    return result


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:28} {accuracy:.3f}")
