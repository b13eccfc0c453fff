"""From logits to a kept set: what training samples and scores (`act`), and what inference does
(`serve`)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from tprl.budget import keep_top
from tprl.errors import UserError
from tprl.policy import dpp, sequential
from tprl.policy.networks import alive_first

Select = Literal["topk", "gumbel", "dpp", "threshold"]


@dataclass(frozen=True)
class ActionRule:
    """How an action is drawn from the logits at pruning step t (0-based).

    Args:
        kind: "bernoulli": each alive token on its own, keep probability discount^t * sigmoid(logit
            / temperature), any count. "subset": exactly k tokens, P(Y) proportional to exp(sum over
            Y of logit / temperature) (conditional Bernoulli: free of order, with an exact
            log-probability). "dpp": exactly k tokens, a k-DPP with L = diag(q) S diag(q), log q =
            quality / 2 * logit / temperature: relevance times diversity. "sequential": exactly k
            tokens one after the other, each in proportion to the 1 / temperature-th power of its
            marginal gain of det L, log q = quality / 2 * logit (`policy.sequential`). Temperature 0
            is greedy MAP.
        discount: the paper's lambda_disc, Bernoulli only.
        temperature: divides the logits, or the log gains of "sequential"; only there does sampling
            approach what a DPP serves as it falls.
        quality: weight of relevance against diversity, "dpp" and "sequential" only.

    Raises:
        UserError: unknown kind, temperature or quality not positive, discount outside (0, 1].
    """

    kind: str
    discount: float = 0.5
    temperature: float = 1.0
    quality: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("bernoulli", "subset", "dpp", "sequential"):
            raise UserError(
                f"action kind must be bernoulli, subset, dpp or sequential, got {self.kind}."
            )
        if not (self.temperature > 0 and self.quality > 0):
            raise UserError(
                "temperature and quality must be above 0, "
                f"got {self.temperature} and {self.quality}."
            )
        if not 0 < self.discount <= 1:
            raise UserError(f"discount must be in (0, 1], got {self.discount}; use e.g. 0.5.")

    @property
    def exact(self) -> bool:
        """Whether every action holds exactly k tokens."""
        return self.kind != "bernoulli"

    @property
    def per_set(self) -> bool:
        """Whether a set has one log-probability; otherwise every decision has its own."""
        return self.kind in ("subset", "dpp")


def action_kind(budget: str, law: str, select: str) -> str:
    """The kind of `ActionRule` that a stage's budget, its law and what the pruner serves by ask
    for.

    Raises:
        UserError: an unknown law, or a training that is not what is served.
    """
    if law not in ("sequential", "kdpp"):
        raise UserError(f"stage.law must be sequential or kdpp, got {law}.")
    # Trained on what is served: a DPP by one of its two laws, anything else by k-subsets.
    if budget == "exact_k":
        return "subset" if select != "dpp" else "sequential" if law == "sequential" else "dpp"
    if select == "dpp":
        raise UserError(
            f"stage.budget={budget} trains tokens one by one, which policy.select=dpp does "
            "not serve: use policy.select=topk or threshold, or stage.budget=exact_k."
        )
    return "bernoulli"


def noise_width(rule: ActionRule, v: int) -> int:
    """Uniforms per sample that `act` consumes for `v` (padded) tokens."""
    return 2 * v if rule.kind == "dpp" else v


def act(
    logits: Float[Tensor, "B V"],
    alive: Bool[Tensor, "B V"],
    rule: ActionRule,
    t: int,
    *,
    k: Int[Tensor, " B"] | None = None,
    features: Float[Tensor, "B V Z"] | None = None,
    action: Shaped[Tensor, "B *G V"] | None = None,
    noise: Float[Tensor, "B *G N"] | None = None,
    start: Int[Tensor, "B *G V"] | None = None,
) -> tuple[Shaped[Tensor, "B *G V"], Float[Tensor, "B *G A"], Float[Tensor, "B *G A"]]:
    """Sample an action (`action` None) or evaluate a given one; the same code, so the two cannot
    drift apart.

    Args:
        logits: one per token; entries of dead tokens are ignored.
        alive: tokens that may be kept.
        rule: the distribution.
        t: pruning step, 0-based.
        k: tokens to keep, exact kinds only; on the host, or their largest is waited for.
        features: what two tokens are alike in, kinds "dpp" and "sequential" only (see
            `dpp.unit_features`).
        action: the action to evaluate: a mask, or for "sequential" the place of every token in the
            order of drawing, from 1 on, 0 where it was not drawn. With an axis G: several actions
            of the same state, which share one normalizer (for a DPP: one eigendecomposition).
        noise: uniforms in [0, 1) to sample with, at least `noise_width` of them; the same axis G.
        start: "sequential" only: places of tokens that the action begins with and that were not
            drawn from these logits; what follows is drawn given them.

    Returns:
        The action (what is positive is executed), its log-probability and the entropy, in nats.
        Bernoulli: A = V, per token, 0 where not alive; if nothing was drawn the likeliest token is
        forced, and the log-probability is that of the resulting mask. "sequential": A = V, that of
        each draw given those before it, 0 where not drawn. Sets: A = 1. A common offset of the
        logits changes no exact kind. Entropy of "subset" is exact, divided by k; those of "dpp" and
        "sequential" have no closed form: they are the entropy of softmax(quality * logit /
        temperature) over alive tokens divided by log(alive), a differentiable stand-in in [0, 1].

    Raises:
        ValueError: an argument the rule needs is missing, k is more than what is alive, or an
            action does not hold exactly k alive tokens.
    """
    # One function samples and evaluates; exactly one of both is asked for.
    if (action is None) == (noise is None):
        raise ValueError("give either an action to evaluate or noise to sample with.")
    needed = noise_width(rule, alive.shape[1])
    if noise is not None and noise.shape[-1] < needed:
        raise ValueError(f"{noise.shape[-1]} uniforms per sample, {needed} are needed.")
    # [B V] dead tokens get 0, not -inf: every law masks them in its own way.
    scores = logits.float().masked_fill(~alive, 0.0) / rule.temperature
    if rule.kind == "bernoulli":
        return _bernoulli(scores, alive, rule.discount**t, action, noise)
    if k is None:
        raise ValueError(f"kind {rule.kind} keeps exactly k tokens: give k.")
    _check_count(alive, k, action)
    # A set has one log-probability, a sequence one per draw.
    if rule.kind == "subset":
        action, log_prob, entropy = _subset(scores, alive, k, action, noise)
    elif features is None:
        raise ValueError(f"kind {rule.kind} needs the features of the diversity kernel.")
    elif rule.kind == "sequential":
        return _sequential(logits.float(), alive, rule, k, features, action, noise, start)
    else:
        action, log_prob, entropy = _kdpp(scores, alive, rule.quality, k, features, action, noise)
    # [B] -> [B *G]: the entropy belongs to the state, not to the action.
    entropy = entropy.float().reshape(-1, *[1] * (log_prob.ndim - 1)).expand_as(log_prob)
    return action, log_prob.float().unsqueeze(-1), entropy.unsqueeze(-1)


def serve(
    logits: Float[Tensor, "B V"],
    alive: Bool[Tensor, "B V"],
    k: Int[Tensor, " B"] | None,
    select: Select,
    *,
    features: Float[Tensor, "B V Z"] | None = None,
    tau: float | None = None,
    noise: Float[Tensor, "B N"] | None = None,
    quality: float = 2.0,
    temperature: float = 1.0,
    start: Bool[Tensor, "B V"] | None = None,
) -> Bool[Tensor, "B V"]:
    """The kept set at inference; one True per row at least where anything is alive.

    "topk": the k largest logits. "gumbel": top-k of logit / temperature + Gumbel noise, N >= V
    uniforms. "dpp": greedy MAP of the kernel that kinds "dpp" and "sequential" sample from.
    "threshold": every token with sigmoid(logit) > tau, or the likeliest one; k is not used. All but
    a threshold keep the tokens of `start`, at most k, and choose the others beside them.

    Raises:
        ValueError: an argument the mode needs is missing, or the mode is unknown.
    """
    if select == "threshold":
        if tau is None:
            raise ValueError("select=threshold needs tau: calibrate it on validation data.")
        return _at_least_one(alive & (logits.float().sigmoid() > tau), logits.float(), alive)
    if k is None:
        raise ValueError(f"select={select} keeps exactly k tokens: give k.")
    # The other modes keep exactly k tokens and compare finite scores.
    scores = logits.float().masked_fill(~alive, 0.0) / temperature
    if start is not None and select != "dpp":
        scores = scores.masked_fill(start, torch.inf)
    if select == "topk":
        return keep_top(scores, alive, k)
    if select == "gumbel":
        if noise is None:
            raise ValueError("select=gumbel needs noise.")
        tiny = torch.finfo(torch.float32).tiny
        # -log(-log u); both clamps keep a uniform of 0, or one that rounds to 1, finite.
        exponential = -noise[:, : alive.shape[1]].float().clamp(min=tiny).log()
        gumbel = -exponential.clamp(min=tiny).log()
        return keep_top(scores + gumbel, alive, k)
    if select == "dpp":
        if features is None:
            raise ValueError("select=dpp needs the features of the diversity kernel.")
        return sequential.greedy(quality * scores, features, alive, k, start)
    raise ValueError(f"select={select} is unknown: use topk, gumbel, dpp or threshold.")


def _bernoulli(
    x: Tensor, alive: Tensor, discount: float, action: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent tokens with keep probability p = discount * sigmoid(x)."""
    # log p = log discount + log sigmoid(x).
    log_discount = x.new_tensor(discount).log()
    log_p = F.logsigmoid(x) + log_discount
    # 1 - p = sigmoid(-x) * (1 + (1 - discount) e^x): no difference of nearly equal numbers,
    # whatever x is.
    log_q = F.logsigmoid(-x) + F.softplus(x + x.new_tensor(1 - discount).log())
    if action is None:
        assert noise is not None
        noise = noise[..., : x.shape[1]]
        valid = _like(alive, noise)
        p = _like(log_p.detach().exp(), noise)
        action = _at_least_one((noise < p) & valid, p, valid)
    valid = _like(alive, action)
    # [B *G V] log p of what was kept, log(1 - p) of what was not; nothing off the alive tokens.
    log_prob = torch.where(action, _like(log_p, action), _like(log_q, action))
    log_prob = log_prob.masked_fill(~valid, 0.0)
    entropy = -(log_p.exp() * log_p + log_q.exp() * log_q)
    return action, log_prob, _like(entropy, action).masked_fill(~valid, 0.0)


def _subset(
    scores: Tensor, alive: Tensor, k: Tensor, action: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditional Bernoulli: log P(Y) = sum of the scores of Y - log e_k(exp(scores))."""
    # One law of k-subsets serves all actions of a state.
    law = dpp.subset_law(scores.masked_fill(~alive, -torch.inf), k)
    if action is None:
        assert noise is not None
        action = dpp.sample_subset(law, noise)
        _check_count(alive, k, action)
    k = k.to(alive.device)
    # log P(Y) = sum over Y of the scores - log e_k; [B *G].
    chosen = (_like(scores.double(), action) * action).sum(-1)
    normalizer = dpp.log_normalizer(law).reshape(-1, *[1] * (chosen.ndim - 1))
    return action, chosen - normalizer, dpp.subset_entropy(law) / k.clamp(min=1)


def _kdpp(
    scores: Tensor,
    alive: Tensor,
    quality: float,
    k: Tensor,
    features: Tensor,
    action: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """k-DPP over the alive tokens, which are gathered to the front."""
    # [B W] the alive tokens, gathered: a decomposition costs the cube of the width.
    at = alive_first(alive)
    front = alive.gather(1, at)
    log_q = dpp.log_quality(scores, alive, k, quality).gather(1, at)
    # [B W W] similarity F F^T + jitter I of the gathered tokens.
    rows = features.gather(1, at.unsqueeze(2).expand(-1, -1, features.shape[2]))
    similarity = rows @ rows.mT + dpp.JITTER * torch.diag_embed(front.float())
    law = dpp.kdpp(log_q, similarity, front, k)
    # Draws go back to their columns: [B *G W] -> [B *G V].
    if action is None:
        assert noise is not None
        drawn = dpp.sample_kdpp(law, noise)
        action = _like(torch.zeros_like(alive), drawn).scatter(-1, _like(at, drawn), drawn)
        _check_count(alive, k, action)
    log_prob = dpp.kdpp_log_prob(law, action.gather(-1, _like(at, action)))
    return action, log_prob, _evenness(quality * scores, alive)


def _sequential(
    logits: Tensor,
    alive: Tensor,
    rule: ActionRule,
    k: Tensor,
    features: Tensor,
    action: Tensor | None,
    noise: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens one after the other (`policy.sequential`), whose log-probabilities stand where the
    tokens do."""
    # 2 log q per token: quality weighs relevance against diversity.
    scores = rule.quality * logits.masked_fill(~alive, 0.0)
    if action is None:
        assert noise is not None
        # `sequential` knows one axis of sequences: [B *G N] -> [B G N].
        flat = noise.reshape(len(noise), -1, noise.shape[-1])
        begun = None if start is None else start.reshape(*flat.shape[:2], alive.shape[1])
        drawn = sequential.draw(scores, features, alive, k, rule.temperature, flat, begun)
        action = drawn.reshape(*noise.shape[:-1], alive.shape[1])
        _check_count(alive, k, action)
    flat = action.reshape(len(action), -1, action.shape[-1])
    log_prob = sequential.log_prob(scores, features, alive, k, rule.temperature, flat)
    log_prob = log_prob.reshape(action.shape)
    # Every draw of a sequence has the entropy of its state; what it began with was not drawn.
    evenness = _evenness(scores / rule.temperature, alive).float()
    evenness = evenness.reshape(-1, *[1] * (action.ndim - 1))
    drawn_here = action > 0 if start is None else (action > 0) & (start == 0)
    return action, log_prob * drawn_here, evenness * drawn_here


def _evenness(logits: Tensor, alive: Tensor) -> Tensor:
    """Entropy of a softmax over alive tokens, divided by its largest possible value."""
    # Entropy = log Z - E[logit], of the softmax over alive tokens.
    masked = logits.masked_fill(~alive, -torch.inf)
    probability = masked.softmax(1).masked_fill(~alive, 0.0)
    log_total = masked.logsumexp(1).nan_to_num(neginf=0.0)
    spread = log_total - (probability * logits).sum(1)
    return spread / alive.sum(1).clamp(min=2).log()


def _like(per_state: Tensor, per_action: Tensor) -> Tensor:
    """[B W] -> [B *G W]: the same for every action of a state."""
    shape = (len(per_state), *[1] * (per_action.ndim - 2), per_state.shape[-1])
    return per_state.reshape(shape).expand(*per_action.shape[:-1], -1)


def _at_least_one(keep: Tensor, scores: Tensor, alive: Tensor) -> Tensor:
    """Force the best-scored alive token where nothing is kept; ties go to the lower index."""
    # [B V] the likeliest token; `best & alive` stays empty where nothing is alive.
    best = F.one_hot(scores.masked_fill(~alive, -torch.inf).argmax(-1), alive.shape[-1]).bool()
    return torch.where(keep.any(-1, keepdim=True), keep, best & alive)


def _check_count(alive: Tensor, k: Tensor, action: Tensor | None) -> None:
    """Refuse a k that cannot be, or an action that does not hold exactly k alive tokens; looks at
    the device once."""
    k = k.to(alive.device)
    faults = [(k > alive.sum(1)).any()]
    if action is not None:
        keep = action > 0
        # Both counts: dead tokens in an action would pass the first and fail the second.
        kept = (keep & _like(alive, keep)).sum(-1)
        wanted = k.reshape(-1, *[1] * (kept.ndim - 1))
        faults.append(((kept != wanted) | (keep.sum(-1) != wanted)).any())
    too_many, *other = torch.stack(faults).tolist()
    if too_many:
        raise ValueError("k is more than the tokens alive.")
    if any(other):
        raise ValueError("an action does not hold exactly k alive tokens.")
