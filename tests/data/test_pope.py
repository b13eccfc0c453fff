"""POPE: its rule for yes and no, its numbers on twenty answers, its rows."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_text, encoded, official, write_jsonl

from tprl.data.pope import Pope, read
from tprl.data.taking import take
from tprl.errors import UserError

# category, answer, what the model says
ASKED = [
    ("adversarial", "yes", "Yes"),
    ("adversarial", "yes", "Yes, there is."),
    ("adversarial", "yes", "No"),
    ("adversarial", "yes", "There is no dog."),
    ("adversarial", "no", "No, there is not."),
    ("adversarial", "no", "NO"),
    ("adversarial", "no", "Not that I see."),
    ("adversarial", "no", "no"),
    ("popular", "yes", "yes"),
    ("popular", "yes", ""),
    ("popular", "yes", "It is. Not sure"),
    ("popular", "no", "no!"),
    ("popular", "no", "I see none"),
    ("popular", "no", "It does not, I think"),
    ("random", "yes", "  No  "),
    ("random", "yes", "I do not know"),
    ("random", "no", "No,dog"),
    ("random", "no", "there is no, dog"),
    ("random", "no", "no"),
    ("random", "no", "Nothing."),
]
SAID = [output for _, _, output in ASKED]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Is there a thing {number} in the image?",
            "answer": answer,
            "image_source": f"COCO_val2014_{number // 4:012}",
            "image": as_text(encoded(number // 4)),
            "category": category,
        }
        for number, (category, answer, _) in enumerate(ASKED)
    ]


@pytest.fixture
def pope(tmp_path: Path) -> Pope:
    return Pope(source=str(write_jsonl(tmp_path / "pope.jsonl", rows())))


class TestScore:
    def test_the_numbers_of_twenty_answers(self, pope: Pope) -> None:
        """True positives, false positives, misses, rejections: 2 2 2 2, 3 2 0 1, 0 2 2 2; together
        5 6 4 5."""
        expected = {
            "accuracy": 50,
            "precision": 45.4545,
            "recall": 55.5556,
            "f1": 50,
            "yes_rate": 55,
            "accuracy/adversarial": 50,
            "precision/adversarial": 50,
            "recall/adversarial": 50,
            "f1/adversarial": 50,
            "yes_rate/adversarial": 50,
            "accuracy/popular": 66.6667,
            "precision/popular": 60,
            "recall/popular": 100,
            "f1/popular": 75,
            "yes_rate/popular": 83.3333,
            "accuracy/random": 33.3333,
            "precision/random": 0,
            "recall/random": 0,
            "f1/random": 0,
            "yes_rate/random": 33.3333,
        }
        assert official(pope, SAID) == pytest.approx(expected, abs=1e-4)
        assert pope.headline in expected

    def test_neither_order_nor_repetition_matters(self, pope: Pope) -> None:
        backwards = [*range(19, -1, -1), 3, 3, 11]
        assert official(pope, SAID, backwards) == official(pope, SAID)

    def test_nothing_found_is_zero_and_no_division(self, pope: Pope) -> None:
        numbers = official(pope, ["no"] * 20)
        assert numbers["accuracy"] == pytest.approx(55)
        assert (numbers["precision"], numbers["recall"], numbers["f1"], numbers["yes_rate"]) == (
            0,
            0,
            0,
            0,
        )

    @pytest.mark.parametrize(
        ("prediction", "meaning"),
        [
            ("No", "no"),
            ("no", "no"),
            ("No.", "no"),
            ("\nNo\n", "no"),
            ("No, I am not", "no"),
            ("I would say no", "no"),
            ("No idea", "no"),
            ("Yes", "yes"),
            ("Yes. No.", "yes"),
            ("NO", "yes"),
            ("Not at all", "yes"),
            ("no\nbecause", "yes"),
            ("nope", "yes"),
            ("There isn't", "yes"),
            ("maybe", "yes"),
        ],
    )
    def test_the_released_rule_to_the_letter(self, prediction: str, meaning: str) -> None:
        assert read(prediction) == meaning


class TestRows:
    def test_a_sample(self, pope: Pope) -> None:
        sample = pope[9]
        assert sample.uid == "pope/test/COCO_val2014_000000000002/popular-9"
        assert sample.question == (
            "Is there a thing 9 in the image?\nAnswer the question using a single word or phrase."
        )
        assert (sample.answers, sample.family, sample.images[0].size) == (
            ("yes",),
            "popular",
            (24, 16),
        )
        assert sample.images[0] is pope[10].images[0]
        assert sample.images[0].tobytes() != pope[12].images[0].tobytes()

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = rows()
        bad[0]["image"] = {"bytes": "A" * 2000, "path": None}
        bad[1]["answer"] = "maybe"
        bad[2]["answer"] = None
        bad[3]["question"] = " "
        bad[4]["category"] = "easy"
        bad[5]["image"] = None
        del bad[6]["question"]
        pope = Pope(source=str(write_jsonl(tmp_path / "pope.jsonl", bad)), max_bad_rows=0.35)
        assert [sample.uid.rpartition("-")[2] for sample in take(pope, range(20))] == [
            str(n) for n in range(7, 20)
        ]
        assert pope.damage == {
            "broken image": 1,
            "no answer": 2,
            "empty question": 1,
            "unknown category": 1,
            "no image": 1,
            "no column 'question'": 1,
        }

    def test_too_many_damaged_rows(self, tmp_path: Path) -> None:
        bad = rows()
        bad[2]["answer"] = bad[5]["answer"] = ""
        path = write_jsonl(tmp_path / "pope.jsonl", bad)
        pope = Pope(source=str(path), max_bad_rows=0.05)
        with pytest.raises(UserError) as error:
            take(pope, range(20))
        assert str(error.value) == (
            "pope: row 5 has a fault (no answer), and with it 2 of 20 rows (no answer: 2), "
            f"more than max_bad_rows=0.05 allows: mend {path}, or raise dataset.max_bad_rows."
        )

    def test_limit_and_splits(self, tmp_path: Path) -> None:
        path = str(write_jsonl(tmp_path / "pope.jsonl", rows()))
        assert len(Pope(source=path, limit=7)) == 7
        assert len(Pope(source=path, limit=700)) == 20
        with pytest.raises(IndexError):
            Pope(source=path, limit=7)[7]
        with pytest.raises(UserError, match="limit must be at least 1 or null, got 0"):
            Pope(source=path, limit=0)
        with pytest.raises(
            UserError,
            match="pope has no labelled split 'train', only test: train on another dataset",
        ):
            Pope("train", source=path)
