"""ScreenSpot-Pro: clicks and boxes of twenty answers worked out by hand, and its rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_text, encoded, official, picture, write_jsonl

from tprl.data.screenspot_pro import ScreenSpotPro
from tprl.data.taking import take
from tprl.errors import UserError

# The box is (10, 10, 30, 30) of 100 x 50 pixels, in thousandths [100, 200, 300, 600].
# group, type of element, what the model says, whether its click is in the box, IoU
ASKED: list[tuple[str, str, str, int, float]] = [
    ("Dev", "text", "[100, 200, 300, 600]", 1, 1),
    ("Dev", "icon", "(200, 400)", 1, 0),
    ("Dev", "icon", "(100, 200)", 1, 0),  # on the corner
    ("Dev", "text", "(99, 200)", 0, 0),
    ("Creative", "text", "[300, 600, 100, 200]", 1, 1),  # corners swapped
    ("Creative", "icon", "<box>(100,200),(200,400)</box>", 1, 0.25),
    ("Creative", "icon", '```json\n[{"bbox_2d": [0, 0, 1000, 1000], "label": "5"}]\n```', 0, 0.08),
    ("CAD", "text", "I cannot find it.", 0, 0),
    ("CAD", "icon", "[10, 10, 30, 30]", 0, 0),  # pixels, read as thousandths
    ("CAD", "icon", "[0.1, 0.2, 0.3, 0.6]", 0, 0),  # fractions, likewise
    ("Scientific", "text", "(200, 400) and then (900, 900)", 1, 0),
    ("Scientific", "text", "(900, 900). Or (200, 400)", 0, 0),
    ("Scientific", "icon", "<point>200 400</point>", 1, 0),
    ("Office", "text", "[200, 400]", 1, 0),
    ("Office", "text", "200, 400", 1, 0),
    ("Office", "icon", "[100, 200, 300", 0, 0),  # cut off
    ("OS", "text", "[100, 200, 300, 600, 700]", 0, 0),
    ("OS", "text", "[120, 240, 280, 560]", 1, 0.64),
    ("OS", "icon", "", 0, 0),
    ("OS", "icon", "The box is [100,200,300,600]; I click (900,900)", 1, 1),
]
SAID = [prediction for _, _, prediction, _, _ in ASKED]


def rows(images: bool = True) -> list[dict[str, Any]]:
    records = [
        {
            "img_filename": f"vscode_macos/screen_{number // 4}.png",
            "bbox": [10, 10, 30, 30],
            "instruction": f"press button {number}",
            "instruction_cn": "按",
            "id": f"vscode_macos_{number}",
            "application": "vscode",
            "platform": "macos",
            "img_size": [100, 50],
            "ui_type": kind,
            "group": group,
        }
        for number, (group, kind, _, _, _) in enumerate(ASKED)
    ]
    if images:
        for number, row in enumerate(records):
            row["image"] = as_text(encoded(number // 4, (100, 50)))
    return records


@pytest.fixture
def screens(tmp_path: Path) -> ScreenSpotPro:
    return ScreenSpotPro(
        source=str(write_jsonl(tmp_path / "screens.jsonl", rows())), coordinates="thousand"
    )


class TestScore:
    def test_of_each_answer(self, screens: ScreenSpotPro) -> None:
        for number, (_, _, prediction, hit, overlap) in enumerate(ASKED):
            sample = screens[number]
            assert (
                screens.score(sample, prediction),
                screens.iou(sample, prediction),
            ) == pytest.approx((hit, overlap)), prediction

    def test_the_numbers_of_twenty_answers(self, screens: ScreenSpotPro) -> None:
        """Eleven clicks of twenty, six of ten on text, five of ten on icons; the IoUs sum to
        3.97."""
        expected = {
            "accuracy": 55,
            "mean_iou": 19.85,
            "accuracy/text": 60,
            "accuracy/icon": 50,
            "accuracy/Dev": 75,
            "accuracy/Creative": 66.66667,
            "accuracy/CAD": 0,
            "accuracy/Scientific": 66.66667,
            "accuracy/Office": 66.66667,
            "accuracy/OS": 50,
        }
        assert official(screens, SAID) == pytest.approx(expected, abs=1e-4)
        assert official(screens, SAID, [*range(19, -1, -1), 4, 4]) == pytest.approx(
            expected, abs=1e-4
        )
        assert screens.headline in expected

    def test_what_was_not_asked_has_no_number(self, screens: ScreenSpotPro) -> None:
        numbers = official(screens, SAID[:4])
        assert (numbers["accuracy"], numbers["accuracy/Dev"], numbers["accuracy/text"]) == (
            75,
            75,
            50,
        )
        assert numbers["accuracy/OS"] != numbers["accuracy/OS"]


class TestRows:
    def test_a_sample(self, screens: ScreenSpotPro) -> None:
        sample = screens[9]
        assert sample.uid == "screenspot_pro/test/vscode_macos/screen_2.png/vscode_macos_9"
        assert sample.question == (
            "Find the element of this screen that the instruction is "
            "about.\nInstruction: press button 9\nAnswer with one box [x1, y1, "
            "x2, y2] on a scale from 0 to 1000 for the image's width and height."
        )
        assert (sample.family, sample.box) == ("CAD-icon", (10.0, 10.0, 30.0, 30.0))
        assert sample.answers == ("[100, 200, 300, 600]",)
        assert sample.images[0] is screens[8].images[0]

    def test_a_huge_screen_is_scaled_down_with_its_box(
        self, screens: ScreenSpotPro, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(screens, "max_pixels", 1250)
        sample = screens[0]
        assert (sample.images[0].size, sample.box) == ((50, 25), (5.0, 5.0, 15.0, 15.0))
        assert screens.iou(sample, "[100, 200, 300, 600]") == pytest.approx(1)

    def test_a_box_counts_in_the_size_that_the_row_names(self, tmp_path: Path) -> None:
        """As in the released evaluation, which divides it by that size."""
        twice = [{**row, "img_size": [200, 100], "bbox": [20, 20, 60, 60]} for row in rows()]
        data = ScreenSpotPro(
            source=str(write_jsonl(tmp_path / "twice.jsonl", twice)), coordinates="absolute"
        )
        assert data[0].box == (10.0, 10.0, 30.0, 30.0)

    def test_a_clone_of_the_authors_repository(self, tmp_path: Path) -> None:
        (tmp_path / "annotations").mkdir()
        (tmp_path / "images/vscode_macos").mkdir(parents=True)
        for number in range(5):
            picture(number, (100, 50)).save(tmp_path / f"images/vscode_macos/screen_{number}.png")
        listed = rows(images=False)
        (tmp_path / "annotations/a.json").write_text(json.dumps(listed[:15]))
        (tmp_path / "annotations/b.json").write_text(json.dumps(listed[15:]))
        data = ScreenSpotPro(source=str(tmp_path), coordinates="thousand")
        assert len(take(data, range(20))) == 20
        assert data[19].images[0].tobytes() == picture(4, (100, 50)).tobytes()
        assert official(data, SAID)["accuracy"] == pytest.approx(55)

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = rows()
        bad[0]["bbox"] = [30, 10, 30, 30]
        bad[1]["bbox"] = []
        bad[2]["instruction"] = ""
        bad[3]["ui_type"] = "picture"
        bad[4]["image"] = {"bytes": "A" * 2000, "path": None}
        bad[5]["group"] = None
        bad[6]["img_size"] = None
        path = str(write_jsonl(tmp_path / "bad.jsonl", bad))
        data = ScreenSpotPro(source=path, coordinates="thousand", max_bad_rows=0.35)
        assert len(take(data, range(20))) == 13
        assert data.damage == {
            "no box": 1,
            "empty box": 1,
            "no size of the screen": 1,
            "empty question": 1,
            "unknown group or type of element": 2,
            "broken image": 1,
        }

    def test_there_is_only_a_test_split(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", rows())
        assert len(ScreenSpotPro(source=str(tmp_path))) == 20
        with pytest.raises(
            UserError, match="screenspot_pro has no labelled split 'train', only test"
        ):
            ScreenSpotPro("train", source=str(tmp_path))
