"""Distributions over exact k-subsets: conditional Bernoulli and k-DPP. All in float64, batched, no
eigenvalue of a gradient ever divided by another.

Both need e_k(w), the elementary symmetric polynomial: the sum over all k-subsets of the product of
their weights. With p_i = w_i c / (1 + w_i c) for any c > 0, e_k(w) = P(S = k) * prod(1 + w_i c) /
c^k, where S is the number of successes of independent Bernoulli(p_i). Choosing c so that E[S] is
about k makes P(S = k) large, every number stays in [0, 1], and all terms are positive: nothing
overflows and nothing cancels. P(S = .) of neighboring groups of items is merged in a binary tree
(log2 V steps), and walking down the same tree samples a subset exactly.

`*G` in a shape: optional axes of several subsets drawn from the same weights (one decomposition
serves them all).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from tprl.runtime.deterministic import running_sum

DEAD = -1e4  # log-odds of an item that cannot be drawn: its probability underflows to exactly 0
BISECTIONS = 16  # the tilt c may be rough, any c is exact
# of the kernel: the variance that every token keeps, however similar it is to those drawn
JITTER = 0.01
QUALITY_RANGE = 6.0  # half-width of log q around the k-th largest; see `log_quality`


class SubsetLaw(NamedTuple):
    """P(Y) proportional to the product of w_i over i in Y, |Y| = k, prepared by `subset_law`."""

    log_odds: Float64[Tensor, "B V"]  # log w + log c
    tilt: Float64[Tensor, " B"]  # log c
    k: Int[Tensor, " B"]
    # levels[l]: [B, ceil(V / 2^l), .], law of the number of successes in 2^l neighbors
    levels: list[Tensor]
    most: int  # the largest k, 1 at least


def subset_law(log_w: Float[Tensor, "B V"], k: Int[Tensor, " B"]) -> SubsetLaw:
    """Prepare the law of k-subsets with log-weights `log_w` (-inf: the item cannot be drawn). Where
    `k` is on the host, nothing here or later waits for the device.

    Differentiable with respect to `log_w`; the tilt is a constant, because no result depends on it.
    """
    cap = max(int(k.max()), 1) if len(k) else 1
    # The tilt centers the law of the count on k, so no number underflows.
    dead, k = torch.isneginf(log_w), k.to(log_w.device)
    log_w = log_w.double().masked_fill(dead, DEAD)
    tilt = _tilt(log_w.detach(), dead, k)
    log_odds = (log_w + tilt.unsqueeze(1)).masked_fill(dead, DEAD)
    # Each item alone: the probabilities of 0 and of 1 successes, [B V 2].
    leaves = torch.stack([torch.sigmoid(-log_odds), torch.sigmoid(log_odds)], -1)
    # Pairs of neighbors are merged until one group is left; counts above k are of no use.
    levels = [leaves]
    while levels[-1].shape[1] > 1:
        left, right = _pairs(levels[-1])
        levels.append(_convolve(left, right, cap))
    return SubsetLaw(log_odds, tilt, k, levels, cap)


def log_elementary(log_w: Float[Tensor, "B V"], k: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log e_k(exp(log_w)) per row; -inf where k exceeds the number of items with a finite
    log-weight.

    Differentiable: the gradient is each item's inclusion probability.
    """
    return log_normalizer(subset_law(log_w, k)).to(log_w.dtype)


def log_normalizer(law: SubsetLaw) -> Float64[Tensor, " B"]:
    """log e_k of the (untilted) weights."""
    return _at_k(law.levels[-1], law).log() - _log_q(law).sum(1) - law.k * law.tilt


def subset_entropy(law: SubsetLaw) -> Float64[Tensor, " B"]:
    """Entropy in nats: -E[log P(Y)], exact and differentiable.

    The mean of sum_{i in Y} log-odds is carried up the tree beside the probabilities (an
    expectation semiring, Eisner 2002), so that one backward pass suffices.
    """
    # [B V 2] probabilities p of 0 and 1 successes, and their moments m = p * log-odds.
    table = law.levels[0]
    moment = table * torch.stack([torch.zeros_like(law.log_odds), law.log_odds], -1)
    for level in law.levels[1:]:
        cap = level.shape[-1] - 1
        # Product rule of the semiring: (p, m) x (p', m') = (p p', m p' + p m').
        left, right = _pairs(table)
        left_moment, right_moment = _pairs(moment, neutral=0.0)
        moment = _convolve(left_moment, right, cap) + _convolve(left, right_moment, cap)
        table = level
    # log P(Y) = sum of log-odds + sum of log(1 - p) - log P(S = k); its mean over subsets, negated.
    probability = _at_k(table, law)
    return probability.log() - _log_q(law).sum(1) - _at_k(moment, law) / probability


def sample_subset(law: SubsetLaw, noise: Float[Tensor, "B *G N"]) -> Bool[Tensor, "B *G V"]:
    """Draw subsets from uniform noise in [0, 1), N >= V; exact.

    Walks down the tree: given how many successes a group has, split them over its halves. Each
    split reads the noise at the index of its first right-hand item, so padding on the right changes
    no draw.
    """
    b, v = law.log_odds.shape
    groups = noise.shape[1:-1]
    noise = noise.double().reshape(b, -1, noise.shape[-1])
    # [B G M] successes in each of the M groups of a level, from the root down.
    count = law.k.reshape(b, 1, 1).expand(b, noise.shape[1], 1)
    for depth in range(len(law.levels) - 2, -1, -1):
        # The noise of the first item on the right decides how many go to the left.
        left, right = (half.detach() for half in _pairs(law.levels[depth]))
        middle = torch.arange(left.shape[1], device=noise.device) * 2 ** (depth + 1) + 2**depth
        chosen = _split(left, right, count, noise[..., middle.clamp(max=v - 1)])
        # [B G 2M] counts of both halves, without the group that only pads an odd number.
        count = torch.stack([chosen, count - chosen], -1).flatten(2)
        count = count[..., : law.levels[depth].shape[1]]
    return (count > 0).reshape(b, *groups, v)


class KDPP(NamedTuple):
    """P(Y) proportional to det(L_Y), |Y| = k, with L = diag(q) S diag(q); prepared by `kdpp`."""

    log_q: Float64[Tensor, "B V"]
    similarity: Float64[Tensor, "B V V"]
    alive: Bool[Tensor, "B V"]
    k: Int[Tensor, " B"]
    vectors: Float64[Tensor, "B V V"]  # eigenvectors of L in columns, eigenvalues descending
    # a k-DPP picks k eigenvectors with P proportional to the product of their eigenvalues
    spectrum: SubsetLaw


def kdpp(
    log_q: Float[Tensor, "B V"],
    similarity: Float[Tensor, "B V V"],
    alive: Bool[Tensor, "B V"],
    k: Int[Tensor, " B"],
) -> KDPP:
    """Decompose the kernel, once for any number of draws and log-probabilities. Differentiable in
    `log_q` only.

    d log lambda_j / d log q_i = 2 U_ij^2 gives the gradient without differentiating an
    eigendecomposition. It is exact to first order, also for equal eigenvalues, and costs V^2. 1e-6
    I is added to S, so that a subset larger than the rank of S has a finite log-probability.
    """
    # L = diag(q) S diag(q), dead items apart.
    log_q = log_q.double().masked_fill(~alive, 0.0)
    eye = torch.eye(alive.shape[1], dtype=torch.float64, device=alive.device)
    pairs = alive.unsqueeze(1) & alive.unsqueeze(2)
    similarity = similarity.double().detach().masked_fill(~pairs, 0.0) + 1e-6 * eye
    q = log_q.detach().exp()
    # Dead items get eigenvalue -1: they sort last and never mix with a null space of the alive
    # ones.
    kernel = torch.where(pairs, q.unsqueeze(1) * similarity * q.unsqueeze(2), -eye)
    values, vectors = torch.linalg.eigh(kernel)
    values, vectors = values.flip(1), vectors.flip(2)
    # Gradients enter through the eigenvalues alone, to first order.
    log_values = values.clamp(min=1e-15 * values[:, :1].abs()).log()
    moved = log_q - log_q.detach()  # 0, with a gradient
    log_values = log_values + 2 * torch.einsum("bij,bi->bj", vectors.square(), moved)
    # Eigenvalues descend, so those of dead items stand behind the alive ones.
    rank = torch.arange(alive.shape[1], device=alive.device)
    log_values = log_values.masked_fill(rank >= alive.sum(1, keepdim=True), -torch.inf)
    spectrum = subset_law(log_values, k)
    return KDPP(log_q, similarity, alive, spectrum.k, vectors, spectrum)


def kdpp_log_prob(law: KDPP, action: Bool[Tensor, "B *G V"]) -> Float64[Tensor, "B *G"]:
    """log P(Y) = log det L_Y - log e_k(eigenvalues of L); every action must hold exactly k alive
    items."""
    b, v = law.alive.shape
    # [B G K] the items of every action, in order.
    flat = action.reshape(b, -1, v)
    order = (~flat).to(torch.int8).argsort(dim=-1, stable=True)[..., : law.spectrum.most]
    used = flat.gather(2, order)
    rows = law.similarity.unsqueeze(1).expand(-1, order.shape[1], -1, -1)
    rows = rows.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, v))
    minor = rows.gather(3, order.unsqueeze(2).expand(-1, -1, order.shape[2], -1))
    # Actions with fewer items get a 1 on the diagonal, which changes no determinant.
    eye = torch.eye(order.shape[2], dtype=minor.dtype, device=minor.device)
    minor = torch.where(used.unsqueeze(2) & used.unsqueeze(3), minor, eye)
    # log det L_Y = log det S_Y + 2 sum over Y of log q.
    log_det = torch.linalg.slogdet(minor).logabsdet + 2 * (flat * law.log_q.unsqueeze(1)).sum(-1)
    return (log_det - log_normalizer(law.spectrum).unsqueeze(1)).reshape(action.shape[:-1])


def sample_kdpp(law: KDPP, noise: Float[Tensor, "B *G N"]) -> Bool[Tensor, "B *G V"]:
    """Draw subsets from uniform noise in [0, 1), N >= 2 V; exact (Kulesza and Taskar 2012,
    algorithms 1 and 8).

    Even columns of the noise choose k eigenvectors, odd ones the items: first of a law given by the
    rows' norms in the chosen eigenspace, then of what is left of them after projecting out the
    items already drawn.
    """
    b, v = law.alive.shape
    groups = noise.shape[1:-1]
    noise = noise.double().reshape(b, -1, noise.shape[-1])
    # First k eigenvectors, each set in proportion to the product of its eigenvalues.
    chosen = sample_subset(law.spectrum, noise[..., 0::2])
    steps = min(law.spectrum.most, v)
    column = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[..., :steps]
    # [B G V K] the eigenspace that was chosen; items are drawn by their share of it.
    basis = law.vectors.unsqueeze(1).expand(-1, chosen.shape[1], -1, -1)
    # A sample with fewer items than `steps` has columns that were not chosen: they become zero.
    real = chosen.gather(2, column).unsqueeze(2)
    basis = basis.gather(3, column.unsqueeze(2).expand(-1, -1, v, -1)) * real
    basis = basis.masked_fill(~law.alive[:, None, :, None], 0.0)
    # An item is drawn in proportion to the squared norm of its row of the eigenspace.
    taken = torch.zeros_like(chosen)
    weight = basis.square().sum(-1)
    # orthonormal directions of the drawn items, one per row
    drawn = basis.new_zeros(*basis.shape[:2], steps, steps)
    for step in range(steps):
        active = (step < law.k).unsqueeze(1)
        item = _pick(weight, noise[..., 2 * step + 1])
        # Gram-Schmidt: what the drawn item adds to the directions before it.
        row = basis.gather(2, item[..., None, None].expand(-1, -1, 1, steps)).squeeze(2)
        for _ in range(2):  # twice is enough (Kahan): the directions stay orthogonal to rounding
            overlap = torch.einsum("bgts,bgs->bgt", drawn, row)
            row = row - torch.einsum("bgt,bgts->bgs", overlap, drawn)
        drawn[:, :, step] = row / row.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        # Every other item loses its component along the new direction.
        weight = weight - torch.einsum("bgvs,bgs->bgv", basis, drawn[:, :, step]).square()
        taken |= F.one_hot(item, v).bool() & active.unsqueeze(-1)
        weight = weight.clamp(min=1e-300).masked_fill(taken | ~law.alive.unsqueeze(1), 0.0)
    return taken.reshape(b, *groups, v)


def log_quality(
    logits: Float[Tensor, "B V"], alive: Bool[Tensor, "B V"], k: Int[Tensor, " B"], quality: float
) -> Float64[Tensor, "B V"]:
    """log q = quality / 2 * logit, measured from the k-th largest and clamped to +-QUALITY_RANGE.

    The offset changes no probability. The clamp is part of the policy's definition: beyond it a
    token is as good as surely kept or surely dropped, and without it float64 cannot hold the
    spectrum of L (the diagonal would span more than 16 decimal digits, and small eigenvalues would
    be noise).
    """
    log_q = 0.5 * quality * logits.double()
    # The k-th largest decides what is kept, so the range is centered there.
    ranked = log_q.detach().masked_fill(~alive, -torch.inf).sort(1, descending=True).values
    anchor = ranked.gather(1, (k.to(alive.device) - 1).clamp(min=0).unsqueeze(1))
    centered = log_q - anchor.nan_to_num(neginf=0.0)
    return centered.clamp(-QUALITY_RANGE, QUALITY_RANGE).masked_fill(~alive, 0.0)


def greedy_map(
    kernel: Float[Tensor, "B V V"], alive: Bool[Tensor, "B V"], k: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """k items that greedily maximize det(L_Y), exactly min(k, alive); ties go to the lower index.

    The incremental Cholesky of Chen et al. 2018 (Fast greedy MAP inference for DPPs, algorithm 1),
    batched: a loop over steps, none over samples. Where the kernel's rank is exhausted, the largest
    diagonal entries fill up.
    """
    # Gains are the squared pivots of a Cholesky factor; its rows are kept per step.
    tolerance = kernel.shape[-1] * torch.finfo(kernel.dtype).eps
    kernel = kernel.double()
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    taken, gain = torch.zeros_like(alive), diagonal
    steps, k = min(int(k.max()), alive.shape[1]) if len(k) else 0, k.to(alive.device)
    factors = kernel.new_zeros(len(kernel), steps, alive.shape[1])
    for step in range(steps):
        # Beyond the kernel's rank gains are rounding errors: the diagonal decides instead.
        free = alive & ~taken
        useful = free & (gain > tolerance * diagonal)
        gains = gain.masked_fill(~useful, -torch.inf)
        score = torch.where(useful.any(1, keepdim=True), gains, diagonal)
        item = score.masked_fill(~free, -torch.inf).argmax(1)  # argmax returns the first maximum
        at = item[:, None, None]
        before = factors[:, :step]
        # The new row of the Cholesky factor (algorithm 1, line 6).
        row_factors = before.gather(2, at.expand(-1, step, 1))
        row = kernel.gather(1, at.expand(-1, 1, kernel.shape[2])).squeeze(1)
        row = row - (row_factors * before).sum(1)
        pivot = gain.gather(1, item.unsqueeze(1))
        fresh = useful.gather(1, item.unsqueeze(1))
        factors[:, step] = torch.where(fresh, row / pivot.clamp(min=1e-300).sqrt(), 0.0)
        # Algorithm 1, line 8: d_i^2 falls by e_i^2.
        gain = gain - factors[:, step].square()
        taken = taken | (F.one_hot(item, alive.shape[1]).bool() & free & (step < k).unsqueeze(1))
    return taken


def unit_features(
    features: Float[Tensor, "B V Z"], mask: Bool[Tensor, "B V"]
) -> Float[Tensor, "B V Z"]:
    """Features centered over each sample's valid tokens and scaled to length 1; zero where padded.

    Centering removes what all tokens of an image share, which otherwise makes every pair look
    alike.
    """
    valid = mask.unsqueeze(-1)
    x = features.float().masked_fill(~valid, 0.0)
    # Centered over valid tokens only, so padding moves nothing.
    x = (x - x.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)) * valid
    return F.normalize(x, dim=-1)


def cosine_kernel(
    features: Float[Tensor, "B V D"], mask: Bool[Tensor, "B V"], jitter: float = JITTER
) -> Float[Tensor, "B V V"]:
    """Cosine similarity of `unit_features`, plus jitter * I; zero where padded."""
    x = unit_features(features, mask)
    return x @ x.mT + jitter * torch.diag_embed(mask.float())


def _tilt(log_w: Tensor, dead: Tensor, k: Tensor) -> Tensor:
    """log c with sum_i sigmoid(log_w_i + log c) about k, by bisection."""
    # 40 beyond the extremes every probability is 0 or 1 as far as double precision goes.
    low = -log_w.masked_fill(dead, DEAD).amax(1) - 40
    high = -log_w.masked_fill(dead, -DEAD).amin(1) + 40
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        short = torch.sigmoid(log_w + middle.unsqueeze(1)).sum(1) < k
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    # With every alive item drawn, or none, the bound itself is the answer.
    return torch.where(k >= (~dead).sum(1), high, torch.where(k == 0, low, (low + high) / 2))


def _pairs(table: Tensor, neutral: float = 1.0) -> tuple[Tensor, Tensor]:
    """Left and right halves of neighboring groups; a missing last one has no items, so never a
    success."""
    if table.shape[1] % 2:
        empty = torch.zeros_like(table[:, :1])
        empty[..., 0] = neutral
        table = torch.cat([table, empty], 1)
    return table[:, 0::2], table[:, 1::2]


def _convolve(left: Tensor, right: Tensor, cap: int) -> Tensor:
    """Law of the sum of two counts, up to `cap`: [B M d+1] x [B M d+1] -> [B M min(2d, cap)+1]."""
    d = left.shape[-1] - 1
    size = min(2 * d, cap) + 1
    # [B M size d+1] every entry of the sum is a dot product of one half, reversed, with a window.
    windows = F.pad(right, (d, size - 1 - d)).unfold(-1, d + 1, 1)
    return (windows @ left.flip(-1).unsqueeze(-1)).squeeze(-1)


def _split(left: Tensor, right: Tensor, count: Tensor, noise: Tensor) -> Tensor:
    """How many of `count` [B G M] successes fall into the left half, by inverting the distribution
    function."""
    # [B G M d+1] P(left = j) P(right = count - j) for every j.
    j = torch.arange(left.shape[-1], device=left.device)
    others = count.unsqueeze(-1) - j
    inside = (others >= 0) & (others < right.shape[-1])
    tables = right.unsqueeze(1).expand(-1, count.shape[1], -1, -1)
    other = tables.gather(3, others.clamp(0, right.shape[-1] - 1))
    return _pick((left.unsqueeze(1) * other).masked_fill(~inside, 0.0), noise)


def _pick(weight: Tensor, noise: Tensor) -> Tensor:
    """Index drawn in proportion to `weight` along the last axis; never one of weight 0 unless all
    are."""
    # `<=` steps over leading weights of 0 even at a uniform of exactly 0.
    cumulative = running_sum(weight, -1)
    below = cumulative <= noise.unsqueeze(-1) * cumulative[..., -1:]
    return below.sum(-1).clamp(max=weight.shape[-1] - 1)


def _at_k(table: Tensor, law: SubsetLaw) -> Tensor:
    """The entry of the whole set's law at k; 0 where there are fewer than k items."""
    missing = max(0, law.most + 1 - table.shape[-1])
    root = F.pad(table[:, 0], (0, missing))
    return root.gather(1, law.k.unsqueeze(1)).squeeze(1)


def _log_q(law: SubsetLaw) -> Tensor:
    """log(1 - p_i) of the tilted items, 0 where an item cannot be drawn."""
    return F.logsigmoid(-law.log_odds)
