"""VQAv2: its accuracy on twenty answers worked out by hand, and its rows."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_hub, as_text, encoded, official, write_jsonl

from tprl.data.taking import take
from tprl.data.vqav2 import VQAv2
from tprl.errors import UserError

# type of answer; what ten people say; what the model says; its accuracy
ASKED: list[tuple[str, dict[str, int], str, float]] = [
    ("yes/no", {"yes": 10}, "Yes", 1),
    ("yes/no", {"yes": 6, "no": 4}, "no.", 1),
    ("yes/no", {"yes": 8, "no": 2}, "No", 0.6),
    ("yes/no", {"no": 9, "yes": 1}, "yes", 0.3),
    ("yes/no", {"yes": 10}, "maybe", 0),
    ("number", {"2": 7, "two": 3}, "two", 1),
    ("number", {"3": 3, "4": 7}, "three", 0.9),
    ("number", {"1,000": 5, "1000": 5}, "1000", 1),
    ("number", {"0": 2, "none": 2, "1": 6}, "zero", 1),
    ("number", {"1.5": 10}, "1.5.", 1),
    ("other", {"a dog": 2, "dog": 1, "cat": 7}, "The dog", 0.9),
    ("other", {"t-shirt": 5, "t shirt": 5}, "T-shirt!", 1),
    ("other", {"dont walk": 3, "don't walk": 1, "stop": 6}, "don't walk", 1),
    ("other", {"red, white": 2, "red white": 1, "red": 7}, "red and white", 0),
    ("other", {"red, white": 2, "red white": 1, "blue": 7}, "Red White", 0.9),
    ("other", {"black/white": 2, "gray": 8}, "black / white", 0.6),
    ("other", {"8:30": 10}, "8:30", 1),
    ("other", {"blue": 1, "green": 9}, "blue", 0.3),
    ("other", {"men's": 10}, "mens", 0),
    ("other", {"frisbee": 10}, "", 0),
]
SAID = [prediction for _, _, prediction, _ in ASKED]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "question_type": "what is the",
            "multiple_choice_answer": next(iter(answers)),
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": place + 1}
                for place, answer in enumerate(
                    answer for answer, count in answers.items() for _ in range(count)
                )
            ],
            "image_id": 262148 + number // 4,
            "answer_type": kind,
            "question_id": 262148000 + number,
            "question": f"What is thing {number}?",
            "image": as_text(encoded(number // 4)),
        }
        for number, (kind, answers, _, _) in enumerate(ASKED)
    ]


@pytest.fixture
def vqa(tmp_path: Path) -> VQAv2:
    return VQAv2(source=str(write_jsonl(tmp_path / "vqa.jsonl", rows())))


class TestScore:
    def test_of_each_answer(self, vqa: VQAv2) -> None:
        scores = [vqa.score(vqa[number], prediction) for number, prediction in enumerate(SAID)]
        assert scores == pytest.approx([score for _, _, _, score in ASKED])

    def test_the_numbers_of_twenty_answers(self, vqa: VQAv2) -> None:
        """2.9 of 5, 4.9 of 5 and 5.7 of 10: 13.5 of 20."""
        expected = {
            "accuracy": 67.5,
            "accuracy/yes_no": 58,
            "accuracy/number": 98,
            "accuracy/other": 57,
        }
        assert official(vqa, SAID) == pytest.approx(expected)
        assert official(vqa, SAID, [*range(19, -1, -1), 3]) == pytest.approx(expected)
        assert vqa.headline in expected

    def test_a_type_that_was_not_asked_has_no_number(self, vqa: VQAv2) -> None:
        numbers = official(vqa, SAID[:5])
        assert numbers["accuracy"] == numbers["accuracy/yes_no"] == pytest.approx(58)
        assert numbers["accuracy/other"] != numbers["accuracy/other"]


class TestRows:
    def test_a_sample(self, vqa: VQAv2) -> None:
        sample = vqa[10]
        assert sample.uid == "vqav2/test/262150/262148010"
        assert (
            sample.question
            == "What is thing 10?\nAnswer the question using a single word or phrase."
        )
        assert sample.answers == ("cat",) * 7 + ("a dog",) * 2 + ("dog",)
        assert (sample.family, sample.images[0].size) == ("other", (24, 16))
        assert sample.images[0] is vqa[11].images[0]
        assert vqa.answer_tokens <= 16
        assert not vqa.teacher_forced(sample)

    def test_the_same_from_parquet(self, vqa: VQAv2, tmp_path: Path) -> None:
        stored = [{**row, "image": encoded(number // 4)} for number, row in enumerate(rows())]
        as_hub(stored).to_parquet(tmp_path / "validation.parquet")
        result = VQAv2(source=str(tmp_path))
        assert [result[i].answers for i in range(20)] == [vqa[i].answers for i in range(20)]
        assert official(result, SAID)["accuracy"] == pytest.approx(67.5)

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = rows()
        bad[0]["answers"] = None  # as on the test splits
        bad[1]["answers"] = [{"answer": " ", "answer_confidence": "no", "answer_id": 1}]
        bad[2]["question"] = ""
        bad[4]["image"] = {"bytes": "A" * 2000, "path": None}
        bad[3]["answer_type"] = None
        del bad[5]["answers"]
        vqa = VQAv2(source=str(write_jsonl(tmp_path / "vqa.jsonl", bad)), max_bad_rows=0.3)
        assert len(take(vqa, range(20))) == 14
        assert vqa.damage == {
            "no answer": 2,
            "empty question": 1,
            "broken image": 1,
            "unknown type of answer": 1,
            "no column 'answers'": 1,
        }

    def test_only_validation_has_answers(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        write_jsonl(tmp_path / "data/validation.jsonl", rows())
        assert len(VQAv2(source=str(tmp_path / "data"))) == 20
        with pytest.raises(
            UserError, match="vqav2 has no labelled split 'train', only test: train on another"
        ):
            VQAv2("train", source=str(tmp_path / "data"))
