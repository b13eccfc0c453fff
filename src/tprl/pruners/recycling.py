"""Pruned tokens that live on as the centroids of their clusters (SparseVLM v1.5)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from tprl.budget import image_rows, keep_top
from tprl.lvlm.layer_drop import Look
from tprl.runtime.deterministic import running_sum
from tprl.types import columns_of


def recycle(
    look: Look, scores: Float[Tensor, "B S"], k: Int[Tensor, "B S"]
) -> tuple[Look, Float[Tensor, "B S"]]:
    """v1.5: centroids written into the columns of centers, and scores that keep those columns."""
    at, mask = columns_of(look.visual)
    images = image_rows(mask, look.image.gather(1, at))
    sample = images.sample.unsqueeze(1)
    columns = at[sample, images.at]
    n = images.mask.sum(1)
    # [I W] scores by image, and its budget.
    pool = scores[sample, columns]
    count = k[sample, columns][:, 0]
    clusters = torch.zeros_like(n)
    # how many are clustered depends on how many are pruned first, and that on the clusters
    for _ in range(5):
        clusters = torch.minimum((3 * (n - count + clusters) // 10 + 1) // 10 + 1, count - 1)
    clusters = torch.where(count < n, clusters, 0)
    if not bool(clusters.any()):
        return look, scores
    # The kept, and the best of the pruned, which are clustered.
    keep = keep_top(pool, images.mask, count - clusters)
    size = torch.where(clusters > 0, 3 * (n - count + clusters) // 10 + 1, 0)
    place, real = columns_of(keep_top(pool, images.mask & ~keep, size))
    states = look.hidden[sample, columns.gather(1, place)].float()
    # Centroids live on in the columns of their centers.
    center, centroid = density_peaks(states, real, clusters)
    row, token = center.nonzero(as_tuple=True)
    keep[row, place[row, token]] = True
    hidden = look.hidden.clone()
    column = columns[row, place[row, token]]
    hidden[images.sample[row], column] = centroid[row, token].to(hidden.dtype)
    # Scores of 1 on what lives: the drop that follows keeps exactly these columns.
    best = torch.zeros_like(scores)
    row, token = keep.nonzero(as_tuple=True)
    best[images.sample[row], columns[row, token]] = 1.0
    return look._replace(hidden=hidden), best


def density_peaks(
    x: Float[Tensor, "I T D"], real: Bool[Tensor, "I T"], count: Int[Tensor, " I"]
) -> tuple[Bool[Tensor, "I T"], Float[Tensor, "I T D"]]:
    """DPC-kNN with k = `count` neighbors (a point is its own first): the centers of `count`
    clusters, and at each center the mean of its cluster. Of equally dense points the one with the
    lower index is the denser."""
    both = real.unsqueeze(1) & real.unsqueeze(2)
    order = torch.arange(x.shape[1], device=x.device)
    # Density from the distances to the nearest neighbors, [I T].
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    near = running_sum(distance.square().masked_fill(~both, torch.inf).sort(dim=2).values, 2)
    last = (count - 1).clamp(min=0)[:, None, None].expand(-1, x.shape[1], 1)
    density = (-near.gather(2, last).squeeze(2) / count.clamp(min=1).unsqueeze(1)).exp()
    rows, other = density.unsqueeze(2), density.unsqueeze(1)
    # A center is dense, and far from anything denser.
    denser = both & ((other > rows) | ((other == rows) & (order < order.unsqueeze(1))))
    widest = distance.masked_fill(~both, 0.0).amax((1, 2), keepdim=True)
    center = keep_top(density * torch.where(denser, distance, widest).amin(2), real, count)
    # Every point joins its nearest center.
    nearest = distance.masked_fill(~center.unsqueeze(1), torch.inf).argmin(2)
    nearest = torch.where(center, order, nearest)
    member = (one_hot(nearest, x.shape[1]) * real.unsqueeze(2)).mT.to(x.dtype)  # [I center point]
    return center, member @ x / member.sum(2, keepdim=True).clamp(min=1)
