"""The part of an image that a model sees, and all that counts on it."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tprl.build import load_component
from tprl.data.boxes import box_text, in_pixels
from tprl.data.grounding import Grounding
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.regions import region_rank
from tprl.lvlm.shapes import crop_box
from tprl.report.rasters import mask_picture, probability_picture
from tprl.types import Box, Sample

WIDE = (640, 480)


def cropping(side: int = 48) -> CLIPImageProcessorPil:
    """As LLaVA-1.5's: the shorter side is scaled, and the centre is cut out."""
    crop = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop, do_normalize=False)


def sloped(size: tuple[int, int]) -> Image.Image:
    """Red says how far to the right a pixel is, green how far down, both from 0 to 250."""
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    cropped = load_component("model", "llava", pretrained=None, dtype="float32")
    cropped.processor.image_processor = cropping()
    return cropped


@pytest.mark.parametrize("size", [WIDE, (480, 640), (96, 96), (333, 1000), (50, 37)])
def test_it_is_what_the_stock_processor_cuts_out(size: tuple[int, int]) -> None:
    pixels = cropping()(sloped(size), return_tensors="pt")["pixel_values"][0] * 255
    box = crop_box(cropping(), *size)
    for axis, channel in enumerate(pixels[:2]):
        line = channel.mean(axis)  # red by column, green by row
        cell = (box[axis + 2] - box[axis]) / len(line)
        middle = [box[axis] + (i + 0.5) * cell for i in (4, len(line) - 5)]
        expected = [250 * (at - 0.5) / (size[axis] - 1) for at in middle]
        assert line[[4, -5]].tolist() == pytest.approx(expected, abs=2.0)


def test_literal_boxes() -> None:
    # a quarter of the picture is never seen
    assert crop_box(cropping(336), *WIDE) == (80.0, 0.0, 560.0, 480.0)
    square = CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    assert crop_box(square, *WIDE) == (0.0, 0.0, 640.0, 480.0)  # as SigLIP's


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "internvl3", "smolvlm2"])
def test_other_families_see_everything(name: str) -> None:
    assert load_component("model", name, pretrained=None).seen_box(*WIDE) == (
        0.0,
        0.0,
        640.0,
        480.0,
    )


def test_regions_lie_on_the_grid_of_what_is_seen(lvlm: FrozenLVLM) -> None:
    def rank(box: Box) -> list[int]:
        sample = Sample("s", (Image.new("RGB", WIDE),), "?", ("a",), region=(box,))
        encoded = lvlm.encode([sample], frozenset({"region"}))
        return encoded.extras["region"][0].nonzero().squeeze(1).tolist()

    side = 6  # tokens of the crop, each 80 pixels of the image, from 80 on
    assert rank((85.0, 5.0, 155.0, 75.0)) == [0]
    assert rank((480.0, 400.0, 560.0, 480.0)) == [side * side - 1]
    assert rank((0.0, 0.0, 80.0, 480.0)) == []  # cut away


def test_a_box_beside_the_image_is_on_no_token() -> None:
    sample = Sample(
        "s", (Image.new("RGB", (40, 40)),), "?", ("a",), region=((50.0, 10.0, 60.0, 20.0),)
    )
    assert not region_rank([sample], [[[(4, 4)]]], 16).any()


def test_encoded_says_what_is_seen_and_rows_keep_it(lvlm: FrozenLVLM) -> None:
    samples = [
        Sample(name, (Image.new("RGB", size),), "?", ("a",))
        for name, size in (("a", WIDE), ("b", (96, 96)))
    ]
    encoded = lvlm.encode(samples)
    assert encoded.seen == (((80.0, 0.0, 560.0, 480.0),), ((0.0, 0.0, 96.0, 96.0),))
    assert encoded.rows([1]).seen == encoded.seen[1:]


class Places(Grounding):
    name, protocol = "places", "a test"

    def __init__(self) -> None:
        self._coordinates, self._lvlm, self._rule = None, None, ""

    def sample(self, row: Any, index: int) -> Sample:
        raise NotImplementedError

    def score(self, sample: Sample, prediction: str) -> float:
        raise NotImplementedError


def test_boxes_are_read_and_written_within_what_is_seen(
    lvlm: FrozenLVLM, caplog: pytest.LogCaptureFixture
) -> None:
    data, image = Places(), Image.new("RGB", WIDE)
    data.reads_boxes_as(lvlm)
    assert "of 640 x 480 pixels it shows 75 %" in caplog.text
    assert data.box_in("[0.0, 0.0, 0.5, 1.0]", image) == (80.0, 0.0, 320.0, 480.0)
    assert data.written((80.0, 0.0, 320.0, 480.0), image) == "[0.000, 0.000, 0.500, 1.000]"
    # from the edge on
    assert data.written((0.0, 0.0, 320.0, 480.0), image) == "[0.000, 0.000, 0.500, 1.000]"
    assert in_pixels((1.0, 1.0), (2.0, 4.0), (10.0, 20.0)) == (12.0, 24.0)
    assert (
        box_text((12.0, 24.0, 14.0, 28.0), "absolute", (2.0, 4.0), (10.0, 20.0)) == "[1, 1, 2, 2]"
    )


def test_pictures_show_the_grid_where_it_lies() -> None:
    image = Image.new("RGB", WIDE, (200, 200, 200))
    keep = np.zeros((6, 6), dtype=bool)
    keep[0, 0] = True
    drawn = np.asarray(mask_picture(image, keep, 64, (80.0, 0.0, 560.0, 480.0)))[..., 0]
    assert drawn.shape == (48, 64)
    assert drawn[2, 10] == 200  # kept: pixel 100 of 640
    assert 0 < drawn[2, 20] < 100  # pruned
    assert drawn[2, 2] == drawn[40, 62] == 0  # never seen
    heat = np.asarray(probability_picture(image, keep.astype(float), 64, (80.0, 0.0, 560.0, 480.0)))
    assert heat[2, 2].sum() == 0
    assert heat[2, 10].sum() > heat[2, 20].sum() > 0
    whole = np.asarray(mask_picture(image, keep, 64))[..., 0]
    assert whole[2, 2] == 200


def test_the_oracle_keeps_the_token_of_the_region(lvlm: FrozenLVLM) -> None:
    sample = Sample(
        "s", (Image.new("RGB", WIDE),), "?", ("a",), region=((480.0, 400.0, 560.0, 480.0),)
    )
    oracle = load_component("pruner", "oracle")
    keep = oracle.select(lvlm.encode([sample], frozenset({"region"})), 1 / 36).keep
    assert torch.equal(keep[0].nonzero().squeeze(1), torch.tensor([35]))
