"""ScienceQA-IMG: prompts, accuracy, and a local clone of the hub repository."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_hub, encoded, official

from tprl.data.scienceqa import ScienceQA
from tprl.data.taking import take
from tprl.errors import UserError

CARD = """---
configs:
- config_name: ScienceQA-IMG
  data_files:
  - {split: train, path: ScienceQA-IMG/train-*}
  - {split: validation, path: ScienceQA-IMG/validation-*}
  - {split: test, path: ScienceQA-IMG/test-*}
---
"""
# choices, answer, what the model says
ASKED = [
    (["Maryland", "New York"], 1, "B"),
    (["Maryland", "New York"], 1, "new york."),
    (["Maryland", "New York"], 0, "New York"),
    (["solid", "liquid", "gas"], 2, "The answer is C."),
    (["solid", "liquid", "gas"], 2, "gas or liquid"),
    (["a", "b", "c", "d", "e"], 4, "(e)"),
    (["a", "b", "c", "d", "e"], 3, "Answer: E"),
    (["yes", "no"], 0, ""),
]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "image": encoded(number),
            "question": f"Which one is number {number}?",
            "choices": choices,
            "answer": answer,
            "hint": "Look at the map." if number == 3 else "",
            "task": "closed choice",
            "grade": "grade5",
            "subject": "natural science",
            "topic": "geography",
            "category": "State capitals",
            "skill": "Identify",
            "lecture": "Maps show places.",
            "solution": "It is written there.",
        }
        for number, (choices, answer, _) in enumerate(ASKED)
    ]


def cloned(folder: Path, table: list[dict[str, Any]]) -> str:
    (folder / "ScienceQA-IMG").mkdir()
    (folder / "README.md").write_text(CARD)
    for split, part in (("train", table[:2]), ("validation", table[:3]), ("test", table)):
        as_hub(part).to_parquet(folder / f"ScienceQA-IMG/{split}-00000-of-00001.parquet")
    return str(folder)


def test_accuracy(tmp_path: Path) -> None:
    """Right are 0, 1, 3 and 5."""
    scienceqa = ScienceQA(source=cloned(tmp_path, rows()))
    predictions = [text for *_, text in ASKED]
    assert official(scienceqa, predictions) == {"accuracy": 50}
    assert official(scienceqa, predictions, [7, 0, 1, 1, 2, 6, 5, 4, 3, 3]) == {"accuracy": 50}


def test_samples_of_every_split(tmp_path: Path) -> None:
    source = cloned(tmp_path, rows())
    assert [len(ScienceQA(split, source=source)) for split in ("train", "val", "test")] == [2, 3, 8]
    sample = ScienceQA(source=source)[3]
    assert sample.uid == "scienceqa/test/3/0"
    assert sample.question == (
        "Context: Look at the map.\nWhich one is number 3?\nA. solid\nB. liquid\nC. gas\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (sample.answers, sample.family, sample.images[0].size) == (
        ("C", "gas"),
        "natural science",
        (24, 16),
    )
    assert ScienceQA(source=source)[0].question.startswith("Which one is number 0?\nA. Maryland\n")


def test_damaged_rows_and_limits(tmp_path: Path) -> None:
    bad = rows()
    bad[0]["image"] = None
    bad[1]["image"] = {"bytes": b"no picture", "path": None}
    bad[2]["answer"] = 2
    bad[3]["question"] = ""
    bad[4]["choices"] = ["only one"]
    bad[5]["choices"] = ["a", "", "c", "d", "e"]
    bad[6]["answer"] = None
    source = cloned(tmp_path, bad)
    scienceqa = ScienceQA(source=source, max_bad_rows=1.0)
    assert [sample.uid for sample in take(scienceqa, range(8))] == ["scienceqa/test/7/0"]
    assert scienceqa.damage == {
        "no image": 1,
        "broken image": 1,
        "no answer": 2,
        "empty question": 1,
        "no options": 1,
        "empty option": 1,
    }
    assert len(ScienceQA(source=source, limit=2)) == 2
    with pytest.raises(UserError, match="has no rows of split dev, subset ScienceQA-IMG"):
        ScienceQA("dev", source=source)
