"""MMBench: circular evaluation, vanilla accuracy, categories, and rows with and without their
rotations."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_text, encoded, official, write_jsonl

from tprl.data.mmbench import MMBench
from tprl.data.taking import take
from tprl.errors import UserError

COARSE, LOGIC = "coarse_perception", "logic_reasoning"
# index, options, answer, hint, category
ASKED = [
    (5, ["dog", "cat", "cow", "hen"], "B", "nan", COARSE),
    (7, ["left", "right", "nan", "nan"], "A", "Arrows show the way.", LOGIC),
    (9, ["red", "blue", "green", None], "C", None, COARSE),
]
# question 5: B A D C are right; 7: A B; 9: C B A
SAID = ["B", "A. cat", "(d)", "Cat", "A", "A", "B", "The answer is B", "a"]


def row(
    index: int, options: list[str | None], answer: str, hint: str | None, category: str
) -> dict[str, Any]:
    return {
        "index": index,
        "question": f"Which is it, {index % 1000}?",
        "hint": hint,
        "answer": answer,
        **dict(zip("ABCD", options, strict=True)),
        "category": "image_scene",
        "image": as_text(encoded(index % 1000)),
        "source": "made by hand",
        "L2-category": category,
        "comment": "nan",
        "split": "dev",
    }


def rows() -> list[dict[str, Any]]:
    """First passes, and some of the rotations that the hub's table has."""
    first = [row(*question) for question in ASKED]
    rotated = [
        row(1_000_005, ["cat", "cow", "hen", "dog"], "A", "nan", COARSE),
        row(2_000_005, ["cow", "hen", "dog", "cat"], "D", "nan", COARSE),
        row(1_000_007, ["right", "left", "nan", "nan"], "B", "Arrows show the way.", LOGIC),
    ]
    return [first[0], rotated[0], rotated[1], first[1], rotated[2], first[2]]


@pytest.fixture
def mmbench(tmp_path: Path) -> MMBench:
    return MMBench(source=str(write_jsonl(tmp_path / "dev.jsonl", rows())))


class TestScore:
    def test_a_question_is_right_only_if_all_its_rotations_are(self, mmbench: MMBench) -> None:
        assert official(mmbench, SAID) == pytest.approx(
            {
                "accuracy": 33.33333,
                "vanilla": 66.66667,
                f"accuracy/{COARSE}": 50,
                f"accuracy/{LOGIC}": 0,
            }
        )

    def test_neither_order_nor_repetition_matters(self, mmbench: MMBench) -> None:
        assert official(mmbench, SAID, [8, 0, 7, 1, 6, 2, 5, 3, 4, 4, 0]) == official(mmbench, SAID)

    def test_a_question_with_a_pass_missing_is_vanilla_only(self, mmbench: MMBench) -> None:
        """All of question 5, the first pass of 7."""
        numbers = official(mmbench, SAID, range(5))
        assert (numbers["accuracy"], numbers["vanilla"], numbers[f"accuracy/{COARSE}"]) == (
            100,
            100,
            100,
        )
        assert math.isnan(numbers[f"accuracy/{LOGIC}"])

    def test_always_the_same_letter_is_never_right(self, mmbench: MMBench) -> None:
        numbers = official(mmbench, ["A"] * 9)
        assert (numbers["accuracy"], numbers["vanilla"]) == (0, pytest.approx(33.33333))


class TestRows:
    def test_passes_follow_each_other(self, mmbench: MMBench) -> None:
        samples = take(mmbench, range(len(mmbench)))
        assert [sample.uid.removeprefix("mmbench/test/") for sample in samples] == [
            *("5/1of4", "5/2of4", "5/3of4", "5/4of4"),
            *("7/1of2", "7/2of2"),
            *("9/1of3", "9/2of3", "9/3of3"),
        ]
        assert [sample.answers for sample in samples] == [
            *(("B", "cat"), ("A", "cat"), ("D", "cat"), ("C", "cat")),
            *(("A", "left"), ("B", "left")),
            *(("C", "green"), ("B", "green"), ("A", "green")),
        ]

    def test_prompts(self, mmbench: MMBench) -> None:
        end = "Answer with the option's letter from the given choices directly."
        assert mmbench[1].question == f"Which is it, 5?\nA. cat\nB. cow\nC. hen\nD. dog\n{end}"
        assert (
            mmbench[4].question
            == f"Arrows show the way.\nWhich is it, 7?\nA. left\nB. right\n{end}"
        )
        assert (
            mmbench[5].question
            == f"Arrows show the way.\nWhich is it, 7?\nA. right\nB. left\n{end}"
        )
        assert mmbench[0].images[0] is mmbench[3].images[0]
        assert mmbench[0].family == COARSE

    def test_a_table_of_first_passes_asks_the_same(self, mmbench: MMBench, tmp_path: Path) -> None:
        plain = [record for record in rows() if record["index"] < 1_000_000]
        other = MMBench(source=str(write_jsonl(tmp_path / "plain.jsonl", plain)))
        asked = [
            [(s.uid, s.question, s.answers) for s in take(d, range(9))] for d in (mmbench, other)
        ]
        assert asked[0] == asked[1]
        assert len(asked[0]) == len(other) == 9

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = [row(*question) for question in ASKED]
        bad[0]["image"] = {"bytes": "A" * 2000, "path": None}
        bad[1]["answer"] = "C"
        bad[2]["question"] = ""
        bad.append(row(11, ["one", "nan", "nan", "nan"], "A", None, LOGIC))
        mmbench = MMBench(source=str(write_jsonl(tmp_path / "dev.jsonl", bad)), max_bad_rows=1.0)
        assert take(mmbench, range(10)) == []
        assert mmbench.damage == {
            "broken image": 4,
            "no answer": 2,
            "empty question": 3,
            "no options": 1,
        }

    def test_limit_and_splits(self, tmp_path: Path) -> None:
        path = str(write_jsonl(tmp_path / "dev.jsonl", rows()))
        assert len(MMBench(source=path, limit=6)) == 6
        with pytest.raises(UserError, match="mmbench has no labelled split 'val', only test"):
            MMBench("val", source=path)
        assert MMBench("dev", source=path)[0].uid == "mmbench/dev/5/1of4"
