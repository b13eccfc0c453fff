"""screens: the questions that ship, scores of answers worked out by hand, and damaged or missing
files."""

import hashlib
import json
import zipfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import official, picture

from tprl.data.screens import FAMILIES, POINTING, READING, SHIPPED, Screens
from tprl.data.taking import take
from tprl.errors import UserError
from tprl.types import Sample

SPLITS = ("val", "test", "final", "real")
DRAWN = SPLITS[:3]


@cache
def questions(split: str) -> list[Sample]:
    data = Screens(split, bare=True)
    return take(data, range(len(data)))


def answers_of(split: str) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in questions(split):
        if sample.box is None:
            counts[sample.family][sample.answers[0].lower()] += 1
    return counts


def application(sample: Sample) -> str:
    return sample.uid.split("/")[2].rpartition("-")[0]


def row(number: int, family: str, answer: str = "", page: int = 0) -> dict[str, Any]:
    return {
        "page": page,
        "id": f"{family}_{number}",
        "img_filename": f"images/{page}.png",
        "img_size": [100, 50],
        "application": "bulma",
        "instruction": f"question {number}",
        "bbox": [10, 10, 30, 30],
        "answer": answer,
        "family": family,
        "region": [[10, 10, 30, 30], [40, 10, 60, 30]],
    }


def rendered(
    folder: Path, rows: list[dict[str, Any]], name: str = "train-0", tail: str = ""
) -> str:
    """A folder as the renderer leaves it."""
    place = folder / name
    (place / "images").mkdir(parents=True)
    for page in {row["page"] for row in rows}:
        picture(page, (100, 50)).save(place / "images" / f"{page}.png")
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (place / "questions.jsonl").write_text(text + tail)
    return str(folder)


class TestShipped:
    @pytest.mark.parametrize("split", SPLITS)
    def test_every_question_is_whole(self, split: str) -> None:
        data = Screens(split, bare=True)
        samples = questions(split)
        assert (len(samples), data.damage) == (len(data), {})
        assert len({sample.uid for sample in samples}) == len(samples)
        for sample in samples:
            width, height = sample.images[0].size
            assert (width, height) == (320, 320)
            assert sample.region
            assert (sample.box is not None) == (sample.family in POINTING)
            for x1, y1, x2, y2 in (*sample.region, *filter(None, [sample.box])):
                assert 0 <= x1 < x2 <= width
                assert 0 <= y1 < y2 <= height
            assert len(sample.answers[0].split()) <= (4 if sample.box else 2)

    def test_they_are_as_many_as_claims_need(self) -> None:
        assert len(questions("final")) >= 3000
        assert len({sample.uid.split("/")[2] for sample in questions("val")}) >= 300
        assert len({sample.uid.split("/")[2] for sample in questions("real")}) >= 100
        assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 25_000_000

    @pytest.mark.parametrize("split", SPLITS)
    def test_no_question_is_asked_twice_about_a_page(self, split: str) -> None:
        asked = Counter(
            (sample.uid.split("/")[2], sample.question.lower()) for sample in questions(split)
        )
        assert max(asked.values()) == 1

    @pytest.mark.parametrize("split", DRAWN)
    def test_families_come_equally_often(self, split: str) -> None:
        counts = Counter(sample.family for sample in questions(split))
        assert set(counts) == set(FAMILIES)
        assert max(counts.values()) <= 1.25 * min(counts.values())

    @pytest.mark.parametrize("split", DRAWN)
    def test_no_constant_answers_a_family(self, split: str) -> None:
        for family, counts in answers_of(split).items():
            assert counts.most_common(1)[0][1] < 0.4 * counts.total(), family

    @pytest.mark.parametrize("split", DRAWN)
    def test_no_fixed_point_answers_a_family(self, split: str) -> None:
        data = Screens(split, bare=True)
        for family in POINTING:
            asked = [sample for sample in questions(split) if sample.family == family]
            center = sum(data.score(sample, "160 160 160 160") for sample in asked)
            assert center < 0.1 * len(asked), family

    def test_splits_share_no_picture(self) -> None:
        seen: dict[str, str] = {}
        for split in SPLITS:
            pages = {sample.uid.split("/")[2]: sample.images[0] for sample in questions(split)}
            for page in pages.values():
                digest = hashlib.blake2b(page.tobytes()).hexdigest()
                assert seen.setdefault(digest, split) == split

    def test_the_real_pages_are_of_frameworks_that_no_other_split_has(self) -> None:
        names = {
            split: {sample.uid.split("/")[2].rpartition("-")[0] for sample in questions(split)}
            for split in SPLITS
        }
        assert len(names["real"]) == 4
        assert len(names["final"]) == 13
        assert not names["real"] & (names["final"] | names["val"] | names["test"])

    def test_reading_again_gives_the_same(self) -> None:
        first, again = Screens("val", limit=20, bare=True), Screens("val", limit=20, bare=True)
        for index in range(20):
            assert first[index]._replace(images=()) == again[index]._replace(images=())
            assert first[index].images[0].tobytes() == again[index].images[0].tobytes()

    def test_families_can_be_left_out(self) -> None:
        data = Screens("val", families=("icon", "count"), bare=True)
        assert {sample.family for sample in take(data, range(len(data)))} == {"icon", "count"}


class TestScore:
    # family, true answer, what the model says, right, IoU
    ASKED = (
        ("text", "", "10 10 30 30", 1, 1.0),
        ("icon", "", "[10, 10, 30, 20]", 1, 0.5),
        ("field", "", "(30, 30)", 1, 0.0),  # on the corner
        ("relation", "", "31 10 60 30", 0, 0.0),
        ("value", "Paris", " paris. ", 1, 0.0),
        ("state", "yes", "no", 0, 0.0),
        ("count", "3", '"3"', 1, 0.0),
        ("neighbor", "Log out", "Log", 0, 0.0),
    )

    @pytest.fixture
    def data(self, tmp_path: Path) -> Screens:
        rows = [
            row(number, family, answer) for number, (family, answer, *_) in enumerate(self.ASKED)
        ]
        return Screens("train", source=rendered(tmp_path, rows), bare=True)

    def test_of_each_answer(self, data: Screens) -> None:
        for number, (_, _, text, right, overlap) in enumerate(self.ASKED):
            assert (data.score(data[number], text), data.iou(data[number], text)) == (
                right,
                overlap,
            ), text

    def test_the_official_numbers(self, data: Screens) -> None:
        """Three of four clicks, two of four answers, IoUs of 1.5 on four boxes."""
        numbers = official(data, [text for _, _, text, _, _ in self.ASKED])
        assert (numbers["accuracy"], numbers["click"], numbers["read"], numbers["mean_iou"]) == (
            62.5,
            75,
            50,
            37.5,
        )
        assert [numbers[f"accuracy/{family}"] for family in FAMILIES] == [
            100,
            100,
            100,
            0,
            100,
            0,
            100,
            0,
        ]

    def test_a_family_that_was_not_asked_has_no_number(self, data: Screens) -> None:
        numbers = official(data, ["10 10 30 30"])
        assert (numbers["accuracy"], numbers["click"]) == (100, 100)
        assert numbers["read"] != numbers["read"]

    def test_bare_is_the_instruction_alone(self, data: Screens) -> None:
        assert (data[0].question, data[0].answers) == ("question 0", ("10 10 30 30",))
        assert [data.teacher_forced(data[number]) for number in (0, 4)] == [False, True]

    def test_another_model_is_asked_in_its_own_coordinates(self, tmp_path: Path) -> None:
        source = rendered(tmp_path, [row(0, "icon"), row(1, "count", "3")])
        data = Screens("train", source=source, coordinates="thousand")
        assert data[0].answers == ("[100, 200, 300, 600]",)
        assert data[0].question.endswith(
            "on a scale from 0 to 1000 for the image's width and height."
        )
        assert data.score(data[0], "(200, 400)") == 1
        assert data[1].question == (
            "question 1\nAnswer with one or two words from the screen, a number, yes or no."
        )
        assert not data.teacher_forced(data[1])


class TestFiles:
    def test_pages_are_in_order_and_a_line_that_is_being_written_does_not_count(
        self, tmp_path: Path
    ) -> None:
        rows = [row(0, "count", "1", page=7), row(1, "count", "2", page=3)]
        data = Screens(
            "train", source=rendered(tmp_path, rows, tail='{"page": 9, "inst'), bare=True
        )
        assert [data[number].answers for number in range(len(data))] == [("2",), ("1",)]

    def test_another_seed_is_another_folder(self, tmp_path: Path) -> None:
        source = rendered(tmp_path, [row(0, "count", "5")], "train-4")
        assert Screens("train", source=source, seed=4, bare=True)[0].answers == ("5",)
        with pytest.raises(
            UserError, match=r"train\.zip or train-0.*node render\.mjs --split train --seed 0"
        ):
            Screens("train", source=source)

    def test_no_training_pages_says_how_to_render_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            UserError,
            match=r"in runs/cache/screens .*: render them with `cd experiments/screens &&",
        ):
            Screens("train")

    def test_a_damaged_zip_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "val.zip").write_bytes((SHIPPED / "val.zip").read_bytes()[:5000])
        with pytest.raises(
            UserError, match=r"val\.zip is damaged \(.*\): install tprl again, or pack it with"
        ):
            Screens("val", source=str(tmp_path))
        with zipfile.ZipFile(tmp_path / "test.zip", "w") as file:
            file.writestr("images/1.webp", b"")
        with pytest.raises(UserError, match=r"test\.zip is damaged \(.*questions\.jsonl"):
            Screens("test", source=str(tmp_path))

    def test_a_damaged_line_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"questions\.jsonl, line 2, is not JSON"):
            Screens(
                "train", source=rendered(tmp_path / "a", [row(0, "count", "1")], tail="{broken\n")
            )
        with pytest.raises(UserError, match=r"questions\.jsonl, line 2, is not an object"):
            Screens("train", source=rendered(tmp_path / "b", [row(0, "count", "1")], tail="[1]\n"))

    def test_bad_rows_are_counted(self, tmp_path: Path) -> None:
        rows = [row(number, "count", "1") for number in range(6)]
        rows[1]["bbox"], rows[2]["family"], rows[3]["answer"] = [5, 5, 5, 9], "color", ""
        rows[4]["img_filename"] = "images/none.png"
        data = Screens("train", source=rendered(tmp_path, rows), bare=True, max_bad_rows=1.0)
        assert len(take(data, range(len(data)))) == 2
        assert data.damage == {
            "no box": 1,
            "unknown family": 1,
            "no answer": 1,
            "missing image file": 1,
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"split": "dev"},
                (
                    "split 'dev' does not exist in screens: "
                    "choose one of train, val, test, final, real"
                ),
            ),
            ({"families": ("icon", "icon")}, "choose each at most once from text, icon"),
            ({"families": ("color",)}, r"families=\['color'\] is not valid"),
            (
                {"bare": True, "coordinates": "thousand"},
                "bare=true writes pixels, not coordinates=thousand",
            ),
            ({"limit": 0}, "limit must be at least 1 or null, got 0"),
        ],
    )
    def test_bad_settings_are_one_sentence(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Screens(**options)


def test_reading_and_pointing_are_all_families() -> None:
    assert set(POINTING) | set(READING) == set(FAMILIES)
