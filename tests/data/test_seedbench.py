"""SEED-Bench: its image part alone, accuracy per type of question, and a folder written by
`save_to_disk`."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.data.rows import as_hub, as_text, encoded, official, write_jsonl

from tprl.data.seedbench import SeedBench
from tprl.data.taking import take
from tprl.errors import UserError

# data_id, type of question, answer, what the model says; of type 10 and above: a video
ASKED = [
    ("1454426_2591111986", 5, "A", "A"),
    ("94328.webm", 10, "B", "B"),
    ("1454426_2591111986", 1, "D", "d."),
    ("1454426_2591111986", 5, "C", "three"),
    ("P03/P03_24.MP4", 11, "B", "A"),
    ("2200_100", 5, "B", "C"),
    ("2200_100", 9, "A", "a lot"),
]
QUESTIONS = [0, 2, 3, 5, 6]  # the rows that are about an image
SAID = [ASKED[row][3] for row in QUESTIONS]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "answer": answer,
            "choice_a": "one",
            "choice_b": "two",
            "choice_c": "three",
            "choice_d": "four",
            "data_id": data_id,
            "data_type": "video" if kind > 9 else "image",
            "question": f"How many at {number}?",
            "question_id": f"{'v' * (kind > 9)}{100 + number}",
            "question_type_id": kind,
            "image": [encoded(len(data_id)), encoded(1)][: 1 + (kind > 9)],
            "segment": [648, 658] if kind == 11 else None,
        }
        for number, (data_id, kind, answer, _) in enumerate(ASKED)
    ]


def saved(folder: Path, table: list[dict[str, Any]]) -> str:
    datasets.DatasetDict({"test": as_hub(table, several=True)}).save_to_disk(folder / "seed")
    return str(folder / "seed")


@pytest.fixture
def seedbench(tmp_path: Path) -> SeedBench:
    return SeedBench(source=saved(tmp_path, rows()))


def test_accuracy_per_type(seedbench: SeedBench) -> None:
    """Counting: "A", "three" and not "C"; scene: "d."; text: "a lot" names nothing."""
    numbers = official(seedbench, SAID)
    asked = {name: value for name, value in numbers.items() if not math.isnan(value)}
    assert asked == {
        "accuracy": 60,
        "accuracy/scene_understanding": 100,
        "accuracy/instances_counting": pytest.approx(66.66667),
        "accuracy/text_understanding": 0,
    }
    assert len(numbers) == 10
    backwards = official(seedbench, SAID, [4, 3, 3, 2, 1, 0, 0])
    assert {name: value for name, value in backwards.items() if name in asked} == asked


def test_videos_are_left_out_before_anything_is_counted(
    seedbench: SeedBench, tmp_path: Path
) -> None:
    assert [sample.uid for sample in take(seedbench, range(len(seedbench)))] == [
        "seedbench/test/1454426_2591111986/100",
        "seedbench/test/1454426_2591111986/102",
        "seedbench/test/1454426_2591111986/103",
        "seedbench/test/2200_100/105",
        "seedbench/test/2200_100/106",
    ]
    assert seedbench.damage == {}
    assert len(SeedBench(source=str(tmp_path / "seed"), limit=3)) == 3


def test_a_sample(seedbench: SeedBench) -> None:
    sample = seedbench[1]
    assert sample.question == (
        "How many at 2?\nA. one\nB. two\nC. three\nD. four\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (sample.answers, sample.family) == (("D", "four"), "scene_understanding")
    assert sample.images[0] is seedbench[2].images[0]
    assert sample.images[0].size == (24, 16)


def test_damaged_rows_are_counted_by_reason_and_named_by_their_place_in_the_file(
    tmp_path: Path,
) -> None:
    bad = rows()
    bad[0]["question_type_id"] = 13
    bad[2]["image"] = []
    bad[3]["answer"] = None
    bad[5]["image"] = [{"bytes": b"no picture", "path": None}]
    bad[6]["question"] = None
    source = saved(tmp_path, bad)
    seedbench = SeedBench(source=source, max_bad_rows=1.0)
    assert take(seedbench, range(5)) == []
    assert seedbench.damage == {
        "unknown type of question": 1,
        "no single image": 1,
        "no answer": 1,
        "broken image": 1,
        "empty question": 1,
    }
    with pytest.raises(
        UserError, match=r"seedbench: row 3 has a fault \(no answer\), and with it 1 of 5 rows"
    ):
        SeedBench(source=source)[2]


def test_splits_and_other_tables(tmp_path: Path) -> None:
    source = saved(tmp_path, rows())
    with pytest.raises(UserError, match="seedbench has no labelled split 'train', only test"):
        SeedBench("train", source=source)
    with pytest.raises(UserError, match="has no split dev, only test"):
        SeedBench("dev", source=source)
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "?", "image": as_text(encoded())}])
    with pytest.raises(UserError, match="the rows have no column data_type, only image, question"):
        SeedBench(source=str(other))
