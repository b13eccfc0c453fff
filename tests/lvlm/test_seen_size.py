"""In which coordinates each family writes boxes, and what size it sees an image in."""

import pytest
from PIL import Image

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM

CONVENTIONS = {
    "llava": "relative",
    "llava_next": "relative",
    "smolvlm2": "relative",
    "internvl3": "thousand",
    "qwen2_vl": "thousand",
    "qwen3_vl": "thousand",
    "qwen2_5_vl": "resized",
    "qwen3_5": "thousand",
    "glm4v": "thousand",
    "gemma3": "relative",
    "gemma4": "relative",
    "mistral3": "relative",
    "llava_onevision": "relative",
}


def small(name: str) -> FrozenLVLM:
    return load_component("model", name, pretrained=None, dtype="float32")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "glm4v"])
def test_it_is_what_the_stock_processor_makes_of_an_image(name: str) -> None:
    lvlm = small(name)
    images = lvlm.processor.image_processor
    for size in ((96, 96), (640, 480), (480, 640), (3840, 2160), (30, 200), (100, 37), (41, 43)):
        grid = images(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
        rows, columns = (int(count) * images.patch_size for count in grid[1:])
        assert lvlm.seen_size(*size) == (columns, rows), size


def test_literal_sizes() -> None:
    """The small Qwen2.5-VL sees multiples of 28, at most 64 x 28 x 28 pixels."""
    assert small("qwen2_5_vl").seen_size(640, 480) == (252, 168)
    assert small("qwen2_5_vl").seen_size(480, 640) == (168, 252)
    assert small("llava").seen_size(640, 480) == (640, 480)


@pytest.mark.parametrize(("name", "coordinates"), CONVENTIONS.items())
def test_conventions(name: str, coordinates: str) -> None:
    from tprl.build import target_of

    assert target_of("model", name).coordinates == coordinates
