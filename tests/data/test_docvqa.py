"""DocVQA: ANLS of twenty answers worked out by hand, and its rows."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_text, encoded, official, write_jsonl

from tprl.data.docvqa import DocVQA, anls
from tprl.data.taking import take

# answers, what the model says, its similarity
ASKED: list[tuple[list[str], str, float]] = [
    (["1995"], "1995", 1),
    (["ITC Limited"], "itc limited", 1),
    (["ITC Limited"], "ITC  Limited", 1),
    (["University of California"], "university of california.", 0.96),  # 1 of 25
    (["$10,000"], "10,000", 0.857142857),  # 1 of 7
    (["abcd"], "abxy", 0.5),  # exactly the threshold
    (["abcd"], "axyz", 0),  # 1 - 3/4 is below it
    (["Paul"], "Paula", 0.8),
    (["one", "1"], "1", 1),
    (["the dog"], "dog", 0),  # 1 - 4/7: articles count
    (["5"], "five", 0),  # number words too
    (["T. Smith", "Thomas Smith"], "Thomas Smyth", 0.916666667),
    (["March 5, 1990"], "March 5 1990", 0.923076923),
    (["yes"], "", 0),
    (["0.28"], "0.28", 1),
    (["No"], "NO", 1),
    (["kitten"], "sitting", 0.571428571),  # 3 of 7
    (["Q3"], "The answer is Q3", 0),
    (["a b c"], "a b\nc", 1),
    (["12.5%"], "12.5 %", 0.833333333),
]
SAID = [prediction for _, prediction, _ in ASKED]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "questionId": str(49153 + number),
            "question": f"What is in line {number}?",
            "question_types": ["handwritten", "form"],
            "image": as_text(encoded(number // 4)),
            "docId": 14465 + number // 4,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": str(81 + number // 4),
            "answers": answers,
            "data_split": "val",
        }
        for number, (answers, _, _) in enumerate(ASKED)
    ]


class TestScore:
    def test_of_each_answer(self) -> None:
        assert [anls(prediction, answers) for answers, prediction, _ in ASKED] == pytest.approx(
            [score for _, _, score in ASKED]
        )

    def test_the_number(self, tmp_path: Path) -> None:
        """13.361648 of 20."""
        data = DocVQA(source=str(write_jsonl(tmp_path / "docvqa.jsonl", rows())))
        assert official(data, SAID) == pytest.approx({"anls": 66.808242}, abs=1e-5)
        assert data.headline == "anls"

    def test_lengths_are_those_before_white_space_is_merged(self) -> None:
        """One edit; the answer's seven characters count, not the six that are compared."""
        assert anls("ab cdx", ["ab   cd"]) == pytest.approx(1 - 1 / 7)


class TestRows:
    def test_a_sample(self, tmp_path: Path) -> None:
        (tmp_path / "DocVQA").mkdir()
        write_jsonl(tmp_path / "DocVQA/validation.jsonl", rows())
        data = DocVQA(source=str(tmp_path))
        sample = data[11]
        assert sample.uid == "docvqa/test/pybv0228-83/49164"
        assert (
            sample.question
            == "What is in line 11?\nAnswer the question using a single word or phrase."
        )
        assert sample.answers == ("T. Smith", "Thomas Smith")
        assert sample.images[0] is data[10].images[0]
        assert data.answer_tokens == 32

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = rows()
        bad[0]["answers"] = None  # as on the test split
        bad[1]["answers"] = ["", " "]
        bad[2]["question"] = " "
        bad[4]["image"] = None
        data = DocVQA(source=str(write_jsonl(tmp_path / "bad.jsonl", bad)), max_bad_rows=0.2)
        assert len(take(data, range(20))) == 16
        assert data.damage == {"no answer": 2, "empty question": 1, "no image": 1}
