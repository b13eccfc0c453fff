"""The first part of the first phase, in which the lower layers learn to read."""

from typing import Any

import numpy as np
import pytest
import torch
from experiments.screens.tiny import sheets, tower
from experiments.screens.tiny.attention import LIGHT
from experiments.screens.tiny.blueprint import CELLS, PATCH, SIDE, build, silence
from experiments.screens.tiny.run import Plan
from experiments.screens.tiny.source import letters

SMALL: dict[str, Any] = {
    "vision_width": 64, "vision_layers": 5, "vision_heads": 2, "vision_ffn": 64, "width": 64,
    "layers": 4, "heads": 2, "ffn": 64, "clip_width": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def vision() -> Any:
    return build(**SMALL).llava.model.vision_tower


@torch.no_grad()
def test_bands_know_nothing_of_each_other_and_rows_of_a_band_do(vision: Any) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    other = pixels.clone()
    other[:, :, : 2 * PATCH] += 1  # two rows of the first of five bands, of four rows
    one, two = (tower.see_lines(vision, picture, 3)[0] for picture in (pixels, other))
    changed = (one - two).abs().amax(1).view(CELLS, CELLS) > 1e-4
    assert changed[:4].all()
    assert not changed[4:].any()


@torch.no_grad()
def test_layers_above_the_reading_ones_begin_by_changing_nothing(vision: Any) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    silence(vision, 2)
    hidden, between, _ = tower.see(vision, pixels, 2)
    assert torch.equal(hidden[:, 1:], between)


def test_letters_come_first_and_end_with_their_share() -> None:
    plan = Plan(tower_steps=10, letters=0.3)
    assert [letters(plan, at, 10) for at in (0, 2, 3, 9)] == [True, True, False, False]
    assert not letters(Plan(letters=0.0), 0, 10)


def test_every_row_of_a_sheet_of_words_is_in_the_middle_of_its_patches() -> None:
    if not sheets.MODULES.is_dir():
        pytest.skip(f"the fonts are not installed: cd {sheets.MODULES.parent} && npm install.")
    _, shown = sheets.draw_words(np.random.default_rng(0))
    middles = [(run["y1"] + run["y2"]) / 2 for run in shown["runs"]]
    assert {middle % PATCH for middle in middles} == {PATCH / 2}
    assert {int(middle // PATCH) for middle in middles} == set(range(CELLS))
    assert shown["elements"] == []
    assert len({run["y2"] - run["y1"] for run in shown["runs"]}) > 4  # sizes of text


@torch.no_grad()
def test_light_attention_is_attention(vision: Any) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    outputs = []
    for kind in ("sdpa", LIGHT):
        vision.set_attn_implementation(kind)
        outputs.append(tower.see(vision, pixels, 2)[0])
    assert torch.allclose(*outputs, atol=1e-4)
