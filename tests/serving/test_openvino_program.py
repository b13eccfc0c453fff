"""The numpy of an OpenVINO folder's program: its resize, its arguments; the engine itself is in
tests_openvino."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import tprl.serving.openvino as place


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`runtime.py` where OpenVINO need not be installed."""
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    assert place.__file__ is not None
    spec = importlib.util.spec_from_file_location(
        "answer", Path(place.__file__).with_name("runtime.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [(640, 480), (361, 722), (355, 500), (1001, 1363), (336, 336)])
def test_pixels_are_those_of_the_stock_processor(
    program: ModuleType, size: tuple[int, int]
) -> None:
    """Of 361 pixels, 336 / 361 of them are 335.99... in floating point."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    )
    answerer = SimpleNamespace(
        facts={
            "size": {"shortest_edge": 336},
            "crop": {"height": 336, "width": 336},
            "mean": list(images.image_mean),
            "std": list(images.image_std),
        }
    )
    ours = program.Answerer.pixels(answerer, picture)
    stock = images(picture, return_tensors="np")["pixel_values"]
    assert ours.shape == stock.shape
    assert np.abs(ours - stock).max() < 1e-5


def test_some_sides_were_a_pixel_short(program: ModuleType) -> None:
    assert all(
        min(program.resized((side, 900), {"shortest_edge": 336})) == 336 for side in range(1, 900)
    )
    assert program.resized((20, 10), {"width": 7, "height": 5}) == (7, 5)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.7, float("nan")])
def test_a_ratio_that_cannot_be(program: ModuleType, ratio: float) -> None:
    with pytest.raises(
        ValueError, match=r"^keep_ratio must be a number in \(0, 1\], got .*; use e\.g\. 0\.333\.$"
    ):
        program.Answerer.__call__(SimpleNamespace(facts={"keep_ratio": 0.5}), None, "what?", ratio)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["photo.png"], "error: give an image, a question and, if you like, a keep ratio"),
        (["/nowhere.png", "what?"], "error: .*No such file.*/nowhere.png"),
        (
            ["{image}", "what?", "half"],
            r"error: keep_ratio must be a number in \(0, 1\], got half; use e\.g\. 0\.333",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    monkeypatch.setattr(program, "Answerer", lambda folder: SimpleNamespace(text=lambda *words: ""))
    with pytest.raises(SystemExit, match=sentence):
        program.print_answer(
            [argument.replace("{image}", str(tmp_path / "image.png")) for argument in arguments]
        )
