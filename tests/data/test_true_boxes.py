"""Boxes of rows: units, forms, clipping, and what cannot be right for a whole file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tprl.data.custom import Custom
from tprl.data.refcoco import RefCOCO
from tprl.data.screenspot_pro import ScreenSpotPro
from tprl.data.taking import BadRow, take
from tprl.data.toy import ToyDataset
from tprl.data.true_boxes import BoxReader
from tprl.errors import UserError
from tprl.evaluation.evaluator import about

SIZE = (640, 480)


@pytest.mark.parametrize(
    ("unit", "form", "value", "box", "clipped"),
    [
        ("absolute", "corners", [10, 20, 30, 40], (10, 20, 30, 40), False),
        ("absolute", "size", [10, 20, 30, 40], (10, 20, 40, 60), False),
        ("relative", "corners", [0.25, 0.25, 0.75, 0.75], (160, 120, 480, 360), False),
        ("relative", "size", [0.25, 0.25, 0.5, 0.5], (160, 120, 480, 360), False),
        ("thousand", "corners", [250, 250, 750, 750], (160, 120, 480, 360), False),
        ("absolute", "corners", [600, 400, 660, 490], (600, 400, 640, 480), True),
        ("absolute", "corners", [-10, -5, 100, 100], (0, 0, 100, 100), True),
        ("absolute", "corners", [0, 0, 640.4, 480.2], (0, 0, 640, 480), False),  # rounding
        ("absolute", "corners", [0, 0, 640, 480], (0, 0, 640, 480), False),
        ("relative", "corners", [0, 0, 1.001, 1], (0, 0, 640, 480), True),
    ],
)
def test_boxes_become_pixels_within_the_image(
    unit: str, form: str, value: list[float], box: tuple[float, ...], clipped: bool
) -> None:
    result, cut = BoxReader(unit, form).read(value, SIZE)
    assert result == pytest.approx(box)
    assert cut is clipped


@pytest.mark.parametrize(
    ("unit", "form", "value", "reason"),
    [
        (
            "absolute",
            "corners",
            [0.25, 0.25, 0.75, 0.75],
            "box in another unit: .*fractions; set dataset.box_unit=rel",
        ),
        ("thousand", "corners", [0.25, 0.25, 0.75, 0.75], "box in another unit"),
        (
            "relative",
            "corners",
            [10, 20, 30, 40],
            "box in another unit: .*box_unit=relative is fractions",
        ),
        ("thousand", "corners", [10, 20, 1300, 400], "box in another unit"),
        (
            "absolute",
            "corners",
            [600, 400, 900, 700],
            "box mostly outside of the image: .* 640 x 480",
        ),
        ("absolute", "corners", [-50, -50, 50, 50], "box mostly outside"),
        ("absolute", "corners", [700, 0, 800, 100], "box outside of the image"),
        ("absolute", "corners", [-20, 0, 0, 100], "box outside of the image"),
        ("absolute", "corners", [30, 20, 10, 40], "empty box: .*box_form=size"),
        ("absolute", "corners", [30, 20, 30, 40], "empty box"),
        ("absolute", "size", [30, 20, 0, 40], "empty box: .*width and a height above 0"),
        ("absolute", "size", [30, 20, 10, -4], "empty box"),
        ("absolute", "corners", [30, 20, 40, float("nan")], "no box"),
        ("absolute", "corners", [30, 20, 40, True], "no box"),
        ("absolute", "corners", "30 20 40 50", "no box"),
        ("absolute", "corners", [[30, 20, 40, 50]], "no box"),
        ("absolute", "corners", None, "no box"),
    ],
)
def test_what_cannot_be_right_is_damage(unit: str, form: str, value: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        BoxReader(unit, form).read(value, SIZE)


def test_a_small_image_may_have_a_box_of_one_pixel() -> None:
    assert BoxReader().read([0, 0, 1, 1], (4, 4)) == ((0, 0, 1, 1), False)


@pytest.mark.parametrize("option", [{"box_unit": "percent"}, {"box_form": "xywh"}])
def test_unknown_words(tmp_path: Path, option: dict[str, str]) -> None:
    (key, value), *_ = option.items()
    with pytest.raises(UserError, match=f"dataset.{key} must be one of .*, got {value}"):
        custom(tmp_path, [[1, 1, 20, 20]], **option)


def custom(folder: Path, boxes: list[Any], size: tuple[int, int] = SIZE, **options: Any) -> Custom:
    Image.new("RGB", size).save(folder / "a.png")
    rows = [{"image": "a.png", "question": "Where?", "box": box} for box in boxes]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Custom("all", source=str(folder / "d.jsonl"), coordinates="absolute", **options)


class TestWholeFiles:
    @pytest.mark.parametrize(
        ("boxes", "reason", "remedy"),
        [
            (
                [[0.1, 0.2, 0.3, 0.4]] * 5,
                "5 of 5 boxes hold numbers between 0 and 1",
                {"box_unit": "relative"},
            ),
            (
                [[300, 200, 50, 60]] * 5,
                "in 5 of 5 boxes the second corner is not right",
                {"box_form": "size"},
            ),
            (
                [[500, 500, 990, 980]] * 5,
                "5 of 5 boxes reach outside .* none reaches beyond",
                {"box_unit": "thousand"},
            ),
        ],
    )
    def test_another_unit_is_reported_before_anything_runs(
        self, tmp_path: Path, boxes: list[Any], reason: str, remedy: dict[str, str]
    ) -> None:
        (key, value), *_ = remedy.items()
        with pytest.raises(UserError, match=rf"d\.jsonl: {reason}.*set dataset.{key}={value}"):
            custom(tmp_path, boxes)
        assert len(take(custom(tmp_path, boxes, **remedy), range(5))) == 5

    def test_boxes_of_other_images(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="so they belong to images of another size"):
            custom(tmp_path, [[500, 500, 1990, 1980]] * 5)

    def test_boxes_of_a_turned_image_fit_it_as_it_is_shown(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "d.jsonl").write_text(
            "\n".join(
                [json.dumps({"image": "t.jpg", "question": "Where?", "box": [10, 500, 400, 600]})]
                * 5
            )
        )
        Image.new("RGB", SIZE).save(tmp_path / "t.jpg", exif=exif)
        assert len(Custom("all", source=str(tmp_path / "d.jsonl"))) == 5

    def test_a_few_bad_rows_stay_damage(self, tmp_path: Path) -> None:
        boxes = [[10, 10, 30, 30]] * 17 + [
            [0.1, 0.1, 0.2, 0.2],
            [600, 400, 900, 700],
            [30, 10, 10, 30],
        ]
        data = custom(tmp_path, boxes, max_bad_rows=0.2)
        assert len(take(data, range(20))) == 17
        assert data.damage == {
            "box in another unit": 1,
            "box mostly outside of the image": 1,
            "empty box": 1,
        }


def test_clipped_boxes_are_counted_once_in_what_an_evaluation_says(tmp_path: Path) -> None:
    data = custom(tmp_path, [[600, 400, 660, 490], [10, 10, 20, 20], [-1, -1, 20, 20]])
    take(data, range(3))
    sample = data[0]
    assert sample.answers == ("[600, 400, 640, 480]",)
    assert data.iou(sample, sample.answers[0]) == 1
    assert about(data, [])["boxes clipped to their image"] == 2
    assert "boxes clipped to their image" not in about(ToyDataset("test"), [])


def test_boxes_of_benchmarks_are_checked_alike(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    region = {"image": "a.png", "file_name": "x.png", "answer": ["a"]}
    boxes = [[600, 400, 50, 90], [0.1, 0.1, 0.2, 0.2], [600, 400, 300, 300], [1, 1, 5, 0]]
    (tmp_path / "r.jsonl").write_text(
        "\n".join(json.dumps({**region, "bbox": box}) for box in boxes)
    )
    data = RefCOCO(source=str(tmp_path / "r.jsonl"), coordinates="absolute", max_bad_rows=1.0)
    assert [sample.box for sample in take(data, range(4))] == [(600, 400, 640, 480)]
    assert data.damage == {
        "box in another unit": 1,
        "box mostly outside of the image": 1,
        "empty box": 1,
    }
    corners = RefCOCO(
        source=str(tmp_path / "r.jsonl"),
        coordinates="absolute",
        max_bad_rows=1.0,
        box_form="corners",
    )
    assert take(corners, [0]) == []


@pytest.mark.parametrize(
    ("size", "box", "reason"),
    [
        ([640, 480], [10, 10, 30, 30], None),
        ([1280, 960], [20, 20, 60, 60], None),  # the stored image is a smaller copy
        ([480, 640], [10, 10, 30, 30], "img_size is not that of the image"),
        ([640], [10, 10, 30, 30], "no size of the screen"),
        ([640, math.inf], [10, 10, 30, 30], "no size of the screen"),
        ([640, 480], [10, 10, 5, 30], "empty box"),
        ([640, 480], [0.1, 0.1, 0.5, 0.3], "box in another unit"),
    ],
)
def test_screens(tmp_path: Path, size: list[float], box: list[float], reason: str | None) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    row = {
        "image": "a.png",
        "img_filename": "a.png",
        "id": 1,
        "instruction": "i",
        "group": "Dev",
        "ui_type": "text",
    }
    (tmp_path / "r.jsonl").write_text(json.dumps({**row, "img_size": size, "bbox": box}))
    data = ScreenSpotPro(source=str(tmp_path / "r.jsonl"), coordinates="absolute", max_bad_rows=1.0)
    boxes = [sample.box for sample in take(data, [0])]
    assert (boxes, data.damage) == (([], {reason: 1}) if reason else ([(10, 10, 30, 30)], {}))
