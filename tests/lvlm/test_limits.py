"""Bounds of what a processor makes of an image."""

import pytest
from PIL import Image

from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.llava import Llava
from tprl.types import Sample

LARGE = Sample("large", (Image.new("RGB", (400, 300)),), "what is it?", ("red",))


def small(name: str, **options: int) -> FrozenLVLM:
    return load_component("model", name, pretrained=None, dtype="float32", **options)


def count(lvlm: FrozenLVLM) -> int:
    return int(lvlm.encode([LARGE]).visual_mask.sum())


def test_pixels_of_a_square() -> None:
    """Mistral 3 bounds the longer side alone."""
    bounded = small("mistral3", max_pixels=9 * 28**2 + 100)
    assert count(bounded) == 3 * 3 < count(small("mistral3"))
    with pytest.raises(UserError, match=r"max_pixels=9 is less than the 784 pixels of one token"):
        small("mistral3", max_pixels=9)


@pytest.mark.parametrize(
    ("name", "side"),
    [("qwen2_vl", 28), ("qwen2_5_vl", 28), ("qwen3_vl", 32), ("glm4v", 28)],
)
def test_pixels(name: str, side: int) -> None:
    bounded = small(name, max_pixels=20 * side**2)
    assert count(bounded) <= 20 < count(small(name))
    width, height = bounded.seen_size(400, 300)
    assert width * height <= 20 * side**2


def test_tiles() -> None:
    assert count(small("internvl3")) == 9 * (4 + 1)  # four tiles and the thumbnail
    # two beside each other are too far from its shape
    assert count(small("internvl3", max_tiles=2)) == 9
    wide = LARGE._replace(images=(Image.new("RGB", (400, 200)),))
    assert small("internvl3", max_tiles=2).encode([wide]).visual_mask.sum() == 9 * (2 + 1)
    assert count(small("internvl3", max_tiles=1)) == 9
    assert count(small("smolvlm2")) == 9 * (4 + 1)
    assert count(small("smolvlm2", max_tiles=3)) == 9  # no square of more than one tile is within
    assert count(small("llava_next", max_tiles=2)) < count(small("llava_next"))
    assert count(small("llava_onevision", max_tiles=1)) < count(small("llava_onevision"))


def test_no_tile_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.max_tiles must be at least 1, got 0; leave"):
        load_component("model", "internvl3", pretrained=None, dtype="float32", max_tiles=0)


def test_what_a_family_does_not_have_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.max_tiles .* qwen2_5_vl has no such bound: set model\.max_pixels"
    ):
        small("qwen2_5_vl", max_tiles=4)
    with pytest.raises(
        UserError, match=r"model\.max_pixels .* llava has no such bound: leave it out"
    ):
        small("llava", max_pixels=1000)
    with pytest.raises(
        UserError, match=r"max_pixels=9 is less than the 3136 pixels .* give 3136 or more"
    ):
        small("qwen2_5_vl", max_pixels=9)
    with pytest.raises(
        UserError, match=r"max_tiles=1 is less than the 2 tiles of the smallest layout"
    ):
        small("llava_next", max_tiles=1)


def test_a_family_that_forgets_what_it_promises_is_refused_when_its_class_is_made() -> None:
    with pytest.raises(
        TypeError, match=r"Forgetful has the bound max_tiles and no limit_tiles\(most\)"
    ):
        type("Forgetful", (Llava,), {"bounds": frozenset({"max_tiles"})})
