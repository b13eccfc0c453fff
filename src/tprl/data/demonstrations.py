"""Demonstrations: what a heuristic pruner keeps, stored as masks beside one set of codes per question."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tprl.budget import keep_top_per_image
from tprl.data.benchmark import batches
from tprl.errors import UserError
from tprl.finite import check_finite
from tprl.policy.networks import PolicyInput
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.random import stable_seed
from tprl.rl.rollout import step_ratios
from tprl.types import LVLM, Dataset, Encoded, Pruner


class Demonstrations(NamedTuple):
    """Episodes of one demonstrator. `keep[t]` is alive after step t; every step keeps a subset of the one before."""

    x: PolicyInput  # codes and query in fp16
    keep: Bool[Tensor, "T B V"]
    keep_ratio: Float[Tensor, " B"]

    def batches(self, size: int, generator: torch.Generator) -> Iterator["Demonstrations"]:
        """One epoch in random order."""
        for index in torch.randperm(len(self.keep_ratio), generator=generator).split(size):
            yield Demonstrations(self.x.rows(index), self.keep[:, index], self.keep_ratio[index])


def demonstrate(
    demonstrator: Pruner,
    pruner: LearnedPruner,
    lvlm: LVLM,
    dataset: Dataset,
    count: int,
    keep_ratios: Sequence[float],
    steps: int,
    progressive: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 50,
) -> Demonstrations:
    """Let a heuristic prune `count` training questions in `steps` steps.

    Args:
        demonstrator: a pruner without access to the answer.
        pruner: the learner, whose `observe` says what is stored.
        keep_ratios: each question gets one of them, drawn from (seed, uid).
        steps: T; every step keeps the same share of what is alive.
        progressive: kept share of what is alive at each step instead, e.g. (0.8, 0.6, 0.4) as in the reference code;
            it sets both the number of steps and the final ratio.

    Raises:
        UserError: the demonstrator knows where the answer is.
    """
    if "region" in demonstrator.extras:
        raise UserError(f"pruner={demonstrator.name} knows where the answer is and cannot demonstrate: use another.")
    parts = []
    for samples in batches(dataset, count, batch_size):
        encoded = lvlm.encode(samples, demonstrator.extras)
        keep, ratio = _episodes(demonstrator, encoded, keep_ratios, steps, progressive, seed)
        x = pruner.observe(encoded)
        stored = x._replace(codes=x.codes.half().cpu(), query=x.query.half().cpu(), similarity=None, image=None)
        check_finite({"codes": stored.codes, "question": stored.query}, encoded.uids, "demonstrations in fp16")
        parts.append(Demonstrations(stored, keep.cpu(), ratio))
    return _join(parts)


def _episodes(
    demonstrator: Pruner,
    encoded: Encoded,
    keep_ratios: Sequence[float],
    steps: int,
    progressive: Sequence[float] | None,
    seed: int,
) -> tuple[Bool[Tensor, "T B V"], Float[Tensor, " B"]]:
    """Nested masks. A heuristic's choices at two budgets need not nest, so we go backwards: a longer list starts from
    the shorter one and is filled from the choice at its own budget."""
    schedules = [step_ratios(ratio, steps) for ratio in keep_ratios]
    if progressive:
        shares = torch.tensor(progressive, dtype=torch.float64)
        schedules = [shares.cumprod(0).tolist()]
    drawn = torch.tensor([stable_seed(uid, seed) % len(schedules) for uid in encoded.uids])
    drawn = drawn.to(encoded.embeds.device)
    keep = torch.zeros(len(schedules[0]), *encoded.visual_mask.shape, dtype=torch.bool, device=drawn.device)
    for number, schedule in enumerate(schedules):
        rows = drawn == number
        masks: list[Tensor] = []
        for ratio in reversed(schedule):
            mask = demonstrator.select(encoded, ratio).keep
            if masks:
                mask = keep_top_per_image(masks[-1].float() * 2 + mask, encoded, ratio)
            masks.append(mask)
        keep[:, rows] = torch.stack(masks[::-1])[:, rows]
    assert all(bool((~later | earlier).all()) for earlier, later in pairwise(keep))
    last = torch.tensor([schedule[-1] for schedule in schedules], dtype=torch.float64)
    return keep, last[drawn.cpu()]


def _join(parts: Sequence[Demonstrations]) -> Demonstrations:
    """Concatenate, padding V and Q to the longest."""
    tokens = max(part.x.mask.shape[1] for part in parts)
    words = max(part.x.query_mask.shape[1] for part in parts)

    def joined(name: str, size: int) -> Tensor:
        tensors = [getattr(part.x, name).cpu() for part in parts]
        return torch.cat([F.pad(t, (0,) * (2 * (t.ndim - 2)) + (0, size - t.shape[1])) for t in tensors])

    x = PolicyInput(
        codes=joined("codes", tokens),
        xy=joined("xy", tokens),
        mask=joined("mask", tokens),
        query=joined("query", words),
        query_mask=joined("query_mask", words),
    )
    keep = torch.cat([F.pad(part.keep, (0, tokens - part.keep.shape[2])) for part in parts], 1)
    return Demonstrations(x, keep, torch.cat([part.keep_ratio for part in parts]))
