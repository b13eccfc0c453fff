"""One value where a list is expected, and a list where one value is, in every dataset."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import picture

from tprl.build import build
from tprl.data.taking import BadRow
from tprl.scoring.scorer import RIGHT
from tprl.types import Sample

QUESTION = {"image": "a.png", "image_id": 1, "question_id": 1, "question": "Brand?"}
PAGE = {
    "image": "a.png",
    "ucsf_document_id": 1,
    "ucsf_document_page_no": 1,
    "questionId": 1,
    "question": "Year?",
}
REGION = {"image": "a.png", "file_name": "x.png", "bbox": [1, 1, 10, 10]}
SCIENCE = {
    "image": "a.png",
    "question": "q",
    "choices": ["yes", "no"],
    "answer": 1,
    "hint": None,
    "subject": None,
}
SEED = {
    "image": ["a.png"],
    "data_id": "1",
    "question_id": "1",
    "question": "q",
    "question_type_id": 1,
    "choice_a": "w",
    "choice_b": "x",
    "choice_c": "y",
    "choice_d": "z",
    "answer": "B",
    "data_type": "image",
}
MMBENCH = {
    "image": "a.png",
    "index": 1,
    "question": "q",
    "hint": None,
    "answer": "B",
    "L2-category": "c",
    "A": "x",
    "B": "y",
    "C": None,
    "D": None,
}
VQA = {**QUESTION, "answer_type": "other"}
POPE = {**QUESTION, "image_source": "x", "category": "random", "answer": "yes"}
GQA = {"image": "a.png", "imageId": 1, "id": 1, "question": "Brand?", "answer": "acme"}


def dataset(tmp_path: Path, name: str, row: dict[str, Any], **options: Any) -> Any:
    picture(0, (100, 50)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    target = {
        "custom": "custom.Custom",
        "docvqa": "docvqa.DocVQA",
        "gqa": "gqa.GQA",
        "mmbench": "mmbench.MMBench",
        "pope": "pope.Pope",
        "refcoco": "refcoco.RefCOCO",
        "scienceqa": "scienceqa.ScienceQA",
        "seedbench": "seedbench.SeedBench",
        "textvqa": "textvqa.TextVQA",
        "vqav2": "vqav2.VQAv2",
    }[name]
    config = {
        "_target_": f"tprl.data.{target}",
        "source": str(path),
        "max_bad_rows": 1.0,
        **options,
    }
    return build(config, split="all" if name == "custom" else "test")


def first(tmp_path: Path, name: str, row: dict[str, Any], **options: Any) -> Sample:
    return dataset(tmp_path, name, row, **options)[0]


@pytest.mark.parametrize(
    ("name", "row", "answers"),
    [
        ("textvqa", {**QUESTION, "answers": "acme"}, ("acme",)),
        ("docvqa", {**PAGE, "answers": "1987"}, ("1987",)),
        ("docvqa", {**PAGE, "answers": 1987}, ("1987",)),
        ("vqav2", {**VQA, "answers": "acme"}, ("acme",)),
        ("vqav2", {**VQA, "answers": ["acme", "acme"]}, ("acme", "acme")),
        ("vqav2", {**VQA, "answers": {"answer": "acme"}}, ("acme",)),
        ("vqav2", {**VQA, "answers": {"answer": ["acme", "acme"]}}, ("acme", "acme")),
        ("vqav2", {**VQA, "answers": [{"answer": "acme"}]}, ("acme",)),
        ("custom", {**QUESTION, "answers": "acme"}, ("acme",)),
        ("custom", {**QUESTION, "answers": 7}, ("7",)),
        ("gqa", {**GQA, "answer": ["acme"]}, ("acme",)),
        ("pope", {**POPE, "answer": ["yes"]}, ("yes",)),
        ("seedbench", {**SEED, "image": "a.png"}, ("B", "x")),
        ("mmbench", {**MMBENCH, "A": 3, "B": 4}, ("B", "4")),
        ("scienceqa", {**SCIENCE, "answer": "1"}, ("B", "no")),
        ("scienceqa", {**SCIENCE, "answer": 1.0}, ("B", "no")),
    ],
)
def test_one_value_is_one_value(
    tmp_path: Path, name: str, row: dict[str, Any], answers: tuple[str, ...]
) -> None:
    data = dataset(tmp_path, name, row)
    assert data[0].answers == answers
    assert data.score(data[0], answers[0]) == 1


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("textvqa", {**QUESTION, "answers": "acme"}),
        ("docvqa", {**PAGE, "answers": "acme"}),
        ("vqav2", {**VQA, "answers": "acme"}),
        ("custom", {**QUESTION, "answers": "acme"}),
        ("gqa", GQA),
        ("pope", POPE),
        ("seedbench", SEED),
        ("mmbench", MMBENCH),
        ("scienceqa", SCIENCE),
    ],
)
def test_an_answer_as_a_model_writes_it_is_what_likelihoods_are_of(
    tmp_path: Path, name: str, row: dict[str, Any]
) -> None:
    """Labels are written small, models write "Yes": `Scorer.targets` takes the model's words."""
    data = dataset(tmp_path, name, row)
    sample = data[0]
    assert not data.teacher_forced(sample)
    assert data.score(sample, sample.answers[0].capitalize()) > RIGHT


def test_one_expression_is_one_question(tmp_path: Path) -> None:
    data = dataset(
        tmp_path, "refcoco", {**REGION, "answer": "the left man"}, coordinates="absolute"
    )
    assert len(data) == 1
    assert "describes: the left man\n" in data[0].question


def test_one_ocr_word_is_one_word(tmp_path: Path) -> None:
    row = {**QUESTION, "answers": ["acme"] * 10, "ocr_tokens": "ACME"}
    assert "token: ACME\n" in first(tmp_path, "textvqa", row, ocr_hints=True).question


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        (
            "scienceqa",
            {**SCIENCE, "choices": "yes"},
            r"no options: got \['yes'\], write a list of two or more",
        ),
        ("scienceqa", {**SCIENCE, "answer": True}, "no answer: got True"),
        ("scienceqa", {**SCIENCE, "answer": [1]}, "no answer"),
        ("seedbench", {**SEED, "answer": "BC"}, "no answer"),
        ("seedbench", {**SEED, "image": ["a.png", "a.png"]}, "no single image"),
        ("mmbench", {**MMBENCH, "answer": "AB"}, "no answer"),
        (
            "gqa",
            {**GQA, "answer": ["a", "b"]},
            r"value is not a text: got \['a', 'b'\], write one text",
        ),
        ("gqa", {**GQA, "question": {"text": "a"}}, "value is not a text"),
        (
            "docvqa",
            {**PAGE, "answers": {"text": ["a"]}},
            "value is not a text: got .* write a text or a list of texts",
        ),
        ("textvqa", {**QUESTION, "answers": [["a"]]}, "value is not a text"),
        ("vqav2", {**VQA, "answers": [True]}, "value is not a text"),
        ("custom", {**QUESTION, "answers": ["a", {"b": 1}]}, "value is not a text"),
        ("custom", {**QUESTION, "answers": True}, "value is not a text"),
    ],
)
def test_what_is_neither_is_damage(
    tmp_path: Path, name: str, row: dict[str, Any], reason: str
) -> None:
    data = dataset(tmp_path, name, row)
    with pytest.raises(BadRow, match=reason):
        data[0]
    assert data.damage == {reason.partition(":")[0]: 1}
