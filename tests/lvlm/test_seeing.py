"""Images go through the vision side a few at a time."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.lvlm.small import each_family

from tprl.bench.parity import varied
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.batching import Seen
from tprl.lvlm.frozen import FrozenLVLM

SAMPLES = varied([Scenes("val")[i] for i in range(6)])


@pytest.mark.parametrize("name", each_family())
def test_what_is_seen_does_not_depend_on_how_many_at_a_time(name: str) -> None:
    lvlm: FrozenLVLM = load_component("model", name, pretrained=None, dtype="float32")
    extras = frozenset({"vision_features", "cls_attention"})
    together = lvlm.encode(SAMPLES, extras)
    lvlm.values_at_once = 1
    alone = lvlm.encode(SAMPLES, extras)
    assert torch.allclose(alone.embeds, together.embeds, atol=1e-5)
    assert alone.grids == together.grids
    assert torch.equal(alone.image_of, together.image_of)
    for extra in extras:
        assert torch.allclose(alone.extras[extra], together.extras[extra], atol=1e-5)


def sees_at_most(most: int, lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for so many images at once; the list fills with how many were tried."""
    stock, sizes = lvlm.see, list[int]()

    def see(pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        sizes.append(len(pixels["pixel_values"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError
        return stock(pixels, extras)

    monkeypatch.setattr(lvlm, "see", see)
    return sizes


def test_out_of_memory_halves_the_images(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lvlm: FrozenLVLM = load_component("model", "llava", pretrained=None, dtype="float32")
    expected = lvlm.encode(SAMPLES)
    images = len({id(image) for sample in SAMPLES for image in sample.images})
    lvlm.values_at_once = images * 3 * 48 * 48
    sizes = sees_at_most(2, lvlm, monkeypatch)
    assert torch.allclose(lvlm.encode(SAMPLES).embeds, expected.embeds, atol=1e-5)
    assert sizes[0] == images
    assert max(sizes[-images // 2 :]) <= 2
    assert "out of memory with" in caplog.text
    lvlm.encode(SAMPLES)
    assert max(sizes[-2:]) <= 2  # it stays so
    monkeypatch.setattr(
        lvlm, "see", lambda pixels, extras: (_ for _ in ()).throw(torch.OutOfMemoryError())
    )
    with pytest.raises(UserError, match=r"no memory to see a single image: use .*model\.max_tiles"):
        lvlm.encode(SAMPLES)


def test_halving_starts_from_what_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images are far below the bound: a bound of half as many would let the same two be tried
    again."""
    lvlm: FrozenLVLM = load_component("model", "llava", pretrained=None, dtype="float32")
    pair = [
        SAMPLES[0],
        next(sample for sample in SAMPLES[1:] if sample.images != SAMPLES[0].images),
    ]
    sizes = sees_at_most(1, lvlm, monkeypatch)
    lvlm.encode(pair)
    assert sizes == [2, 1, 1]


def test_a_single_image_that_does_not_fit_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of different sizes: smaller chunks of the others would not help the large one."""
    lvlm: FrozenLVLM = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
    samples = [
        SAMPLES[0]._replace(images=(SAMPLES[0].images[0].resize((side, side)),))
        for side in (280, 56, 57)
    ]
    pixels = lvlm.pixels_of(lvlm.processed(samples)[0])
    rows, calls = lvlm.rows_per_image(pixels), list[int]()
    lvlm.values_at_once = sum(rows[1:]) * pixels["pixel_values"][0].numel()

    def full(pixels: Mapping[str, Any], extras: frozenset[str]) -> Seen:
        calls.append(len(pixels["image_grid_thw"]))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lvlm, "see", full)
    with pytest.raises(UserError, match="no memory to see a single image"):
        lvlm.encode(samples)
    assert calls == [1]
