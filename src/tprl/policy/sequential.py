"""A set policy that draws its tokens one after the other, in proportion to what greedy MAP
compares.

The kernel is L = diag(q) (F F^T + jitter I) diag(q), with unit rows F: quality times diversity.
Given a set Y already drawn, the marginal gain of token i is the factor by which it would multiply
the determinant,

    gain_i(Y) = det(L_{Y + i}) / det(L_Y) = q_i^2 (F_i Sigma_Y F_i^T + jitter),
    Sigma_Y   = (I + F_Y^T F_Y / jitter)^-1,

and the policy is P(i | Y) proportional to gain_i(Y)^(1 / temperature) over the tokens that are
left. As the temperature falls it becomes the greedy MAP of Chen et al. 2018 (Fast greedy MAP
inference for DPPs, algorithm 1): training anneals towards what is served, which tempering the
logits of a k-DPP does not do.

Everything is in the dual form: a step costs O(V Z) for codes of width Z, and no V x V matrix
exists. Quality enters log gain_i only by the summand 2 log q_i, so the gradient is that of a
softmax per step, and no eigenvalue is needed.

Dimension letters: I images, G drawn sequences per image, V tokens, Z width of the features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tprl.policy.dpp import JITTER
from tprl.runtime.deterministic import running_sum

GAIN_RANGE = 40.0  # half-width of log gain before the first step, around the k-th largest
# numbers in the largest array of what is computed at once: about what a cache holds
PORTION = 1 << 19


def log_gains(
    scores: Float[Tensor, "I V"], alive: Bool[Tensor, "I V"], k: Int[Tensor, " I"]
) -> Float64[Tensor, "I V"]:
    """2 log q: the scores, measured from the k-th largest and clamped to +-GAIN_RANGE; 0 where not
    alive.

    The offset changes no probability; the clamp keeps the gains of one image within float64.
    """
    # The k-th largest score is the threshold around which gains must be exact.
    ranked = scores.detach().masked_fill(~alive, -torch.inf).sort(1, descending=True).values
    place = (k.to(alive.device) - 1).clamp(min=0)
    anchor = ranked.gather(1, place.unsqueeze(1)).nan_to_num(neginf=0.0)
    centered = (scores - anchor).double().clamp(-GAIN_RANGE, GAIN_RANGE)
    return centered.masked_fill(~alive, 0.0)


@torch.no_grad()
def greedy(
    scores: Float[Tensor, "I V"],
    features: Float[Tensor, "I V Z"],
    alive: Bool[Tensor, "I V"],
    k: Int[Tensor, " I"],
    start: Bool[Tensor, "I V"] | None = None,
) -> Bool[Tensor, "I V"]:
    """The k tokens that greedily maximize det(L_Y): always the largest gain, ties to the lower
    index.

    Args:
        scores: 2 log q per token.
        features: unit rows, see `dpp.unit_features`.
        alive: tokens that may be kept; k must not exceed their number.
        k: tokens to keep of each image; on the host, or their largest is waited for.
        start: tokens that are kept whatever their gains, at most k; the others are chosen by what
            they add to these.
    """
    keep = torch.zeros_like(alive)
    log_gain, counts = log_gains(scores, alive, k), k.to(alive.device)
    # Quality and features of a portion at once; every image takes one token a step.
    for rows, _ in _portions(features, k, 1, _Gains.size(features, k)):
        steps = int(k[rows].max())
        gains = _Gains(features[rows].double(), log_gain[rows], alive[rows], steps)
        items = []
        for _ in range(steps):
            value = gains.value if start is None else _started(gains.value, start[rows])
            gain, item = value.max(2, keepdim=True)
            gains.take(item, gain)
            items.append(item)
        if items:
            # Where an image needs fewer steps than its neighbors, what it takes after them does not
            # count.
            order = torch.cat(items, 2).squeeze(1)
            step_of = torch.arange(steps, device=alive.device)
            taken = (step_of < counts[rows].unsqueeze(1)).to(torch.uint8)
            hits = torch.zeros_like(keep[rows], dtype=torch.uint8).scatter_add(1, order, taken)
            keep[rows] = hits > 0
    return keep


def _started(value: Float[Tensor, "C G V"], start: Bool[Tensor, "C V"]) -> Float[Tensor, "C G V"]:
    """The gains to choose from: those of `start` while some of it is not taken, then all."""
    # A taken token has gain 0 for ever, and every other a positive one.
    left = start.unsqueeze(1) & (value > 0)
    return value.masked_fill(left.any(2, keepdim=True) & ~left, -torch.inf)


@torch.no_grad()
def draw(
    scores: Float[Tensor, "I V"],
    features: Float[Tensor, "I V Z"],
    alive: Bool[Tensor, "I V"],
    k: Int[Tensor, " I"],
    temperature: float,
    noise: Float[Tensor, "I G N"],
    start: Int[Tensor, "I G V"] | None = None,
) -> Int[Tensor, "I G V"]:
    """Sequences of k tokens each, from uniform noise in [0, 1), N >= max(k); k as for `greedy`.

    `start` holds the places of tokens that each sequence begins with; what follows is drawn given
    them.

    Returns:
        The place of every token in its sequence, from 1 on; 0 for tokens that were not drawn.
    """
    order = torch.zeros(*noise.shape[:2], alive.shape[1], dtype=torch.long, device=alive.device)
    log_gain, counts = log_gains(scores, alive, k), k.to(alive.device)
    for rows, groups in _portions(features, k, noise.shape[1], _Gains.size(features, k)):
        steps = int(k[rows].max())
        uniform = noise[rows, groups]
        place = order[rows, groups]  # a view: writing to it fills `order`
        gains = _Gains(features[rows], log_gain[rows], alive[rows], steps, place.shape[1])
        # All sequences draw at the same time; those that are complete draw without effect.
        for step in range(steps):
            item = _pick(gains.weight(temperature), uniform[..., step])
            if start is not None:
                begun = start[rows, groups] == step + 1
                first = begun.to(torch.uint8).argmax(2, keepdim=True)
                item = torch.where(begun.any(2, keepdim=True), first, item)
            active = (step < counts[rows])[:, None, None]
            place.scatter_add_(2, item, (step + 1) * active.expand_as(item).long())
            gains.take(item, gains.value.gather(2, item))
    return order


def log_prob(
    scores: Float[Tensor, "I V"],
    features: Float[Tensor, "I V Z"],
    alive: Bool[Tensor, "I V"],
    k: Int[Tensor, " I"],
    temperature: float,
    order: Int[Tensor, "I G V"],
) -> Float[Tensor, "I G V"]:
    """log P(i_t | i_1 ... i_{t-1}) at the place of every token of the sequences, 0 at all others.

    Their sum over the last axis is the log-probability of the sequence. Differentiable in `scores`;
    memory does not grow with k, because the backward pass walks through the sequences again.
    """
    log_gain = log_gains(scores, alive, k)
    return _LogProb.apply(log_gain, features, alive, k, temperature, order, None)


def log_stay(
    scores: Float[Tensor, "I V"],
    features: Float[Tensor, "I V Z"],
    alive: Bool[Tensor, "I V"],
    members: Bool[Tensor, "I V"],
    temperature: float,
    noise: Float[Tensor, "I 1 N"],
) -> Float[Tensor, "I 1 V"]:
    """How likely the policy is to draw exactly the set `members`, whose order is not known.

    A sequence is drawn from the policy restricted to the set. With m_t the probability that the
    unrestricted policy stays in the set at step t, E[prod_t m_t] over such sequences is P(the set)
    exactly, so that sum_t log m_t is a lower bound of its log-likelihood in expectation (importance
    sampling and Jensen's inequality).

    Returns:
        log m_t at the place of the token drawn at step t, 0 at all others. Differentiable in
        `scores`.
    """
    k = members.sum(1).cpu()
    order = draw(scores, features, members, k, temperature, noise)
    log_gain = log_gains(scores, alive, k)
    return _LogProb.apply(log_gain, features, alive, k, temperature, order, members)


class _LogProb(torch.autograd.Function):
    """Log-probabilities along given sequences: of each token drawn, or of all `members` not yet
    drawn.

    The gradient at a step with upstream gradient g is that of a softmax, g ([j = i] - P(j)) /
    temperature for token j; where a set is wanted, P(j | the set) stands in for [j = i]. Both
    passes compute the gains anew, portion by portion.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_gain: Tensor,
        features: Tensor,
        alive: Tensor,
        k: Tensor,
        temperature: float,
        order: Tensor,
        members: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(log_gain, features, alive, k, order, members)
        ctx.temperature = temperature
        out = torch.zeros(order.shape, device=order.device)
        counts = k.to(order.device)
        for at, item, gain in _steps(log_gain, features, alive, k, order):
            # log P = log of the wanted weight - log of the sum of all weights, step by step.
            weight, log_scale = _tempered(gain, temperature, 2)
            if members is None:
                log_wanted = gain.gather(2, item.unsqueeze(2)).log() / temperature - log_scale
            else:
                log_wanted = (weight * members[at[0]][:, None, :, None]).sum(2, keepdim=True).log()
            active = _active(item, counts[at[0]])
            log_total = weight.sum(2, keepdim=True).log()
            value = torch.where(active, (log_wanted - log_total).squeeze(2), 0.0)
            # [C H K] by step -> [C H V] by token.
            out[at] = torch.zeros_like(out[at]).scatter_add(2, item, value)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_gain, features, alive, k, order, members = ctx.saved_tensors
        out, counts = torch.zeros_like(log_gain), k.to(order.device)
        for at, item, gain in _steps(log_gain, features, alive, k, order):
            weight, _ = _tempered(gain, ctx.temperature, 2)
            active = _active(item, counts[at[0]])
            grad = torch.where(active, grads[0][at].gather(2, item), 0.0)
            # d log P / d log gain_j = ([j = i] - P(j)) / temperature, summed over the steps.
            pull = -_weighted(weight, grad)
            if members is None:
                pull += grads[0][at] * (order[at] > 0)
            else:
                pull += _weighted(weight * members[at[0]][:, None, :, None], grad)
            out[at[0]] += pull.sum(1) / ctx.temperature
        return out, None, None, None, None, None, None


def _active(item: Int[Tensor, "C H K"], k: Int[Tensor, " C"]) -> Bool[Tensor, "C 1 K"]:
    """Which steps of a portion are before the end of the sequences."""
    return torch.arange(item.shape[2], device=item.device) < k[:, None, None]


def _tempered(gain: Tensor, temperature: float, axis: int) -> tuple[Tensor, Tensor | float]:
    """gain^(1 / temperature) divided by its largest value, and the logarithm of that value. At
    temperature 1 the gains themselves: only a high power leaves the range of the numbers."""
    if temperature == 1:
        return gain, 0.0
    # Divided by the largest first: a high power of any other number may overflow.
    largest = gain.amax(axis, keepdim=True).clamp(min=torch.finfo(gain.dtype).tiny)
    return (gain / largest).pow(1 / temperature), largest.log() / temperature


def _weighted(
    weight: Float[Tensor, "C H V K"], grad: Float[Tensor, "C H K"]
) -> Float[Tensor, "C H V"]:
    """sum_t grad_t P_t(v), with P_t the normalized weights of step t."""
    scale = grad / weight.sum(2).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight @ scale.unsqueeze(3)).squeeze(3)


def _steps(
    log_gain: Tensor, features: Tensor, alive: Tensor, k: Tensor, order: Tensor
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """What every step of given sequences chooses from, for portions of C images and H of their
    sequences.

    Yields:
        Where the portion is (images, sequences), the tokens drawn [C H K], and the gains of all
        tokens [C H V K] at each of the K steps; 0 for tokens that are dead or drawn before.
    """
    for rows, groups in _portions(features, k, order.shape[1]):
        steps = int(k[rows].max())
        place = order[rows, groups]
        # Slot 0 collects the tokens that are not in the sequence.
        size = (*place.shape[:2], place.shape[2] + 1)
        items = torch.zeros(size, dtype=torch.long, device=order.device)
        items.scatter_(2, place, torch.arange(place.shape[2], device=order.device).expand_as(place))
        item = items[..., 1 : steps + 1]
        # Cholesky directions of the tokens drawn: row t of U is what token t adds to those before
        # it, and the gain of token i before step t is |F_i|^2 + jitter - sum_{s < t} (U_s F_i)^2.
        f, c = features[rows], len(features[rows])
        drawn = f[torch.arange(c, device=f.device)[:, None, None], item].double()
        kernel = drawn @ drawn.mT
        kernel.diagonal(dim1=2, dim2=3).add_(JITTER)
        # Without a look at the device: where it fails, what follows is no number and is refused.
        factor, fault = torch.linalg.cholesky_ex(kernel)
        factor = torch.where(fault[..., None, None] == 0, factor, torch.nan)
        directions = torch.linalg.solve_triangular(factor, drawn, upper=False)
        # [C H V K] (U_t F_i)^2, then minus the sum over the steps before t.
        flat = directions.flatten(1, 2).to(f.dtype)
        part = (f @ flat.mT).view(c, f.shape[1], *item.shape[1:]).transpose(1, 2).square_()
        gain = running_sum(part, 3).sub_(part).neg_()
        # The kernel's diagonal, which every gain starts from.
        gain += (f.square().sum(2) + JITTER)[:, None, :, None]
        # Quality enters as a factor q^2; dead tokens get 0.
        quality = (log_gain[rows].exp() * alive[rows]).to(f.dtype)
        gain.clamp_(min=JITTER).mul_(quality[:, None, :, None])
        # Row t of the gains of the drawn tokens is that of token t: nothing is left of it after
        # step t.
        at = item.unsqueeze(3).expand(*item.shape, steps)
        gain.scatter_reduce_(2, at, gain.gather(2, at).tril(), "amin")
        yield (rows, groups), item, gain


class _Gains:
    """Gains of all tokens while sets grow; C images with G sets each.

    A set's conditional covariance is P = I - sum_s u_s h_s^T over the tokens drawn, with u = P b
    the direction of a token b = q F and h = u / gain(b). Drawing it lowers every gain by (b_i
    u)(b_i h) (Schur complement). A greedy step is eight kernels, because on a GPU their launches
    are what a small selection costs.
    """

    def __init__(
        self, features: Tensor, log_gain: Tensor, alive: Tensor, steps: int, groups: int = 1
    ) -> None:
        c, _, z = features.shape
        q = ((0.5 * log_gain).exp() * alive).to(features.dtype)
        self.scaled = features * q.unsqueeze(2)
        # Gains before anything is drawn: the kernel's diagonal.
        diagonal = self.scaled.square().sum(2) + JITTER * q.square()
        # [C G V]; not positive once drawn, 0 where dead
        self.value = diagonal.unsqueeze(1).repeat(1, groups, 1)
        self.factors = features.new_empty(c * groups, steps, 2, z)
        self.step = 0

    @staticmethod
    def size(features: Tensor, k: Tensor) -> int:
        """Numbers held per set."""
        return features.shape[1] + 2 * features.shape[2] * (int(k.max()) if len(k) else 0)

    def weight(self, temperature: float) -> Float[Tensor, "C G V"]:
        """gain^(1 / temperature) of the tokens that are left, up to a factor; 0 of all others."""
        return _tempered(self.value.clamp(min=0), temperature, 2)[0]

    def take(self, item: Int[Tensor, "C G 1"], gain: Float[Tensor, "C G 1"]) -> None:
        """Add a token, with its gain, to every set."""
        c, g, _ = item.shape
        z = self.scaled.shape[2]
        before = self.factors[:, : self.step]
        token = self.scaled.gather(1, item.expand(-1, -1, z)).view(c * g, 1, z)
        # u = P b: the new token less its part along the tokens before it; h = u / gain.
        fresh = self.factors[:, self.step : self.step + 1]
        along = torch.bmm(token, before[:, :, 1].mT)
        torch.baddbmm(token, along, before[:, :, 0], alpha=-1, out=fresh[:, :, 0])
        torch.div(fresh[:, :, 0], gain.view(c * g, 1, 1), out=fresh[:, :, 1])
        # Schur complement: gain_i falls by (b_i u)(b_i h); both products in one kernel.
        pair = fresh.reshape(c, g * 2, z)
        product = torch.bmm(pair, self.scaled.mT).view(c, g, 2, -1)
        self.value.addcmul_(product[:, :, 0], product[:, :, 1], value=-1)
        # A token that is drawn never has a gain again.
        self.value.scatter_(2, item, 0.0)
        self.step += 1


def _portions(
    features: Tensor, k: Tensor, groups: int, each: int = 0
) -> Iterator[tuple[slice, slice]]:
    """Images and sequences in portions whose arrays fit into the cache, so that memory does not
    grow with the batch.

    `each` is the size of the largest array of one sequence; without it that of `_steps`.
    """
    count, v, _ = features.shape
    steps = int(k.max()) if count else 0
    if not steps:
        return
    # Whole images if they fit, else some sequences of one image.
    size = max(1, PORTION // (each or v * steps))  # sequences
    images = max(1, size // groups)
    for start in range(0, count, images):
        rows = slice(start, min(start + images, count))
        for first in range(0, groups, min(size, groups)):
            yield rows, slice(first, min(first + size, groups))


def _pick(weight: Float[Tensor, "C G V"], uniform: Float[Tensor, "C G"]) -> Int[Tensor, "C G 1"]:
    """Index drawn in proportion to `weight`; never one of weight 0 unless all are."""
    cumulative = running_sum(weight, 2)
    below = cumulative <= uniform.unsqueeze(2) * cumulative[..., -1:]
    return below.sum(2, keepdim=True).clamp(max=weight.shape[2] - 1)
