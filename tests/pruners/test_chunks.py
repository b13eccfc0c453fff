"""Selections a few questions at a time."""

from typing import Any

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.build import load_component
from tprl.errors import UserError
from tprl.pruners.base import BasePruner
from tprl.pruners.chunks import select_in_chunks
from tprl.runtime.memory import PER_PAIR
from tprl.types import Encoded, TokenSelection

EXTRAS = frozenset({"cls_attention", "vision_features", "vision_keys", "cls_feature"})
ENCODED = toy_encoded([((6, 6),), ((4, 9),), ((3, 4), (5, 4)), ((6, 6),), ((2, 8),)], extras=EXTRAS)
WIDTH = ENCODED.visual_mask.shape[1]
EACH = PER_PAIR * WIDTH**2 + 8 * WIDTH * ENCODED.embeds.shape[2]  # bytes of a question


@pytest.mark.parametrize("name", ["divprune", "random", "visionzip", "attention_dpp", "pooling"])
def test_the_batch_changes_nothing(name: str) -> None:
    pruner = load_component("pruner", name)
    whole, parts = (
        pruner.select(ENCODED, 0.3),
        select_in_chunks(pruner, ENCODED, 0.3, budget=2 * EACH),
    )
    assert torch.equal(whole.keep, parts.keep)
    for field in ("merged", "extra", "extra_at", "extra_mask"):
        item, other = getattr(whole, field), getattr(parts, field)
        assert (item is None) == (other is None)
        if item is not None:
            mask = (
                whole.extra_mask
                if field == "extra"
                else torch.ones_like(item[..., 0] if item.ndim == 3 else item)
            )
            shape = item.shape[1]
            assert torch.allclose(
                item[mask.bool()].float(), other[:, :shape][mask.bool()].float(), atol=1e-6
            )


class Hungry(BasePruner):
    name, extras, sizes = "hungry", frozenset[str](), list[int]()

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        self.sizes.append(len(encoded))
        if len(encoded) > 1:
            raise torch.OutOfMemoryError
        return TokenSelection(encoded.visual_mask)

    def flops(self, *_: Any) -> int:
        return 0


def test_out_of_memory_halves_them() -> None:
    assert torch.equal(select_in_chunks(Hungry(), ENCODED, 0.5).keep, ENCODED.visual_mask)
    assert Hungry.sizes == [5, 3, 2, 1, 1, 1, 1, 1]


def test_one_question_that_does_not_fit() -> None:
    class Greedy(Hungry):
        def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
            raise torch.OutOfMemoryError

    with pytest.raises(
        UserError,
        match=r"hungry has no memory to select among 36 visual tokens of a single question",
    ):
        select_in_chunks(Greedy(), ENCODED, 0.5)
