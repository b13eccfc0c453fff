"""Keyword color x DPP against a plain loop over pixels, and on pictures of one color each."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.helpers import toy_encoded

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.lvlm.patches import cells
from tprl.pruners.keyword_color import COLORS, FAINT, KeywordColorPruner, likeness
from tprl.types import Encoded


def by_hand(cell: torch.Tensor, colors: list[str]) -> float:
    """The likeness of one token [3 y x]: pixel by pixel."""
    pixels = []
    for y in range(cell.shape[1]):
        for x in range(cell.shape[2]):
            rgb = [float(cell[c, y, x]) for c in range(3)]
            pixels.append([value - sum(rgb) / 3 for value in rgb])
    best = []
    for name in colors:
        hue = [value - sum(COLORS[name]) / 3 for value in COLORS[name]]
        size = math.hypot(*hue)
        like = []
        for p in pixels:
            inner = sum(a * b / size for a, b in zip(p, hue, strict=True))
            like.append(inner / (math.hypot(*p) + FAINT))
        count = max(1, len(like) // 4)
        best.append(sum(sorted(like, reverse=True)[:count]) / count)
    return max(best, default=0.0)


def asked(*questions: str) -> Encoded:
    grids = [((3, 4),) for _ in questions]
    encoded = toy_encoded(grids, extras=["rgb"])
    generator = torch.Generator().manual_seed(0)
    encoded.extras["rgb"] = torch.rand(len(questions), 12, 3, 4, 4, generator=generator)
    return replace(encoded, questions=questions)


def test_likeness_is_that_of_a_plain_loop() -> None:
    questions = {"the small Red disc?": ["red"], "green or cyan?": ["green", "cyan"], "how?": []}
    encoded = asked(*questions)
    scores = likeness(encoded)
    for row, colors in enumerate(questions.values()):
        for token in range(12):
            expected = by_hand(encoded.extras["rgb"][row, token], colors)
            assert float(scores[row, token]) == pytest.approx(expected, abs=1e-5)


def test_the_token_of_the_named_color_is_kept() -> None:
    names = ["red", "green", "blue", "yellow", "purple", "cyan", "orange"]
    encoded = asked(*(f"where is the {name} one?" for name in names))
    cells = torch.zeros(7, 12, 3, 4, 4)  # every picture: a token of each color, then gray ones
    for token, name in enumerate(names):
        cells[:, token] = torch.tensor(COLORS[name]).view(3, 1, 1) / 255
    cells[:, 7:] = 0.5
    encoded.extras["rgb"] = cells
    kept = KeywordColorPruner(10.0).select(encoded, 1 / 12).keep
    assert kept.int().argmax(1).tolist() == list(range(7))


def test_without_a_color_word_diversity_decides() -> None:
    encoded = asked("how many are there?", "how many are there?")
    plain = KeywordColorPruner(0.0).select(asked("the red one?", "blue?"), 0.25).keep
    assert torch.equal(KeywordColorPruner().select(encoded, 0.25).keep, plain)


def test_colors_are_those_of_the_image_whatever_the_processor_normalizes_by() -> None:
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32")
    images = lvlm.processor.image_processor
    side = images.crop_size["height"]
    drawn = Scenes("val")[0].images[0].resize((side, side))
    sample = Scenes("val")[0]._replace(images=(drawn,), question="where is the red one?")
    # [N 3 y x] cells in raster order.
    picture = torch.tensor(np.asarray(drawn), dtype=torch.float32).movedim(2, 0) / 255
    expected = cells(picture, lvlm.model.config.vision_config.patch_size)
    for mean, steps in ((None, (True, True)), (0.5, (True, True)), (0.5, (False, False))):
        if mean is not None:
            images.image_mean, images.image_std = [mean] * 3, [mean / 2] * 3
        images.do_normalize, images.do_rescale = steps
        encoded = lvlm.encode([sample], KeywordColorPruner.extras)
        assert set(encoded.extras) == {"rgb"}
        assert torch.allclose(encoded.extras["rgb"][0], expected, atol=1e-5)
