"""Reference answers that cannot be written within `model.max_new_tokens`."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.data.rows import as_hub, picture, write_jsonl

from tprl.build import load_component
from tprl.data.benchmark import Benchmark
from tprl.data.custom import Custom
from tprl.data.docvqa import DocVQA
from tprl.data.gqa import GQA
from tprl.data.scenes import Scenes
from tprl.data.vqav2 import VQAv2
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM
from tprl.scoring.lengths import Lengths, check_lengths, fit_length, reference_lengths


def model(bound: int, is_set: bool = True) -> Any:
    """One token per letter."""
    return SimpleNamespace(
        name="m",
        max_new_tokens=bound,
        length_is_set=is_set,
        answer_length=lambda text: len(text) + 1,
    )


def custom(folder: Path, answers: list[Any], **options: Any) -> Custom:
    picture(0, (100, 50)).save(folder / "a.png")
    rows = [
        {"image": "a.png", "question": "q", **(a if isinstance(a, dict) else {"answers": a})}
        for a in answers
    ]
    return Custom("all", source=str(write_jsonl(folder / "d.jsonl", rows)), **options)


class TestCounts:
    def test_a_question_needs_its_shortest_answer_and_teaches_its_first(
        self, tmp_path: Path
    ) -> None:
        data = custom(tmp_path, ["a" * 20, ["b" * 20, "b" * 5], ["c", "c" * 20], "d" * 10])
        assert reference_lengths(model(10), data, None, first_only=False) == Lengths(4, 1, 20)
        assert reference_lengths(model(10), data, None, first_only=True) == Lengths(4, 2, 20)
        assert reference_lengths(model(10), data, 1, first_only=False) == Lengths(1, 1, 20)

    def test_the_end_token_needs_no_place(self, tmp_path: Path) -> None:
        data = custom(tmp_path, ["a" * 10])
        assert reference_lengths(model(10), data, None, first_only=False).too_long == 0
        assert reference_lengths(model(9), data, None, first_only=False).too_long == 1

    def test_bytes_that_are_no_text_count_once(self, tmp_path: Path) -> None:
        lvlm = load_component(
            "model", "qwen2_5_vl", pretrained=None, dtype="float32", max_new_tokens=12
        )
        data = custom(tmp_path, ["\ufffd" * 10 + "ab"])
        assert reference_lengths(lvlm, data, None, first_only=False) == Lengths(1, 0, 12)

    def test_rows_without_an_answer_are_left_to_the_damage(self, tmp_path: Path) -> None:
        data = custom(tmp_path, [None, {"answers": {"a": 1}}, "x" * 9])
        assert reference_lengths(model(2), data, None, first_only=False) == Lengths(1, 1, 9)

    def test_no_image_is_opened(self, tmp_path: Path) -> None:
        row = {
            "questionId": "1",
            "ucsf_document_id": "d",
            "ucsf_document_page_no": "1",
            "question": "q",
        }
        table = as_hub(
            [
                {
                    **row,
                    "image": {"bytes": b"no picture", "path": None},
                    "answers": ["x" * 40, "y" * 50],
                }
            ]
        )
        table.save_to_disk(tmp_path / "docs")
        data = DocVQA(source=str(tmp_path / "docs"))
        assert list(data.references()) == [("x" * 40, "y" * 50)]

    def test_of_benchmarks_with_free_answers(self, tmp_path: Path) -> None:
        gqa = {"imageId": "1", "id": "2", "question": "q", "answer": "ab", "image": "a.png"}
        vqa = {
            "answers": [{"answer": "ab"}, {"answer": "ab"}, {"answer": "c"}],
            "answer_type": "other",
        }
        cases: list[tuple[type[Benchmark], dict[str, Any], tuple[str, ...]]] = [
            (GQA, gqa, ("ab",)),
            (VQAv2, vqa, ("ab", "ab", "c")),
        ]
        for kind, row, answers in cases:
            data = kind(source=str(write_jsonl(tmp_path / f"{kind.name}.jsonl", [row])))
            assert list(data.references()) == [answers]


def about_lengths(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Without those of datasets, which other tests may have turned on."""
    return [record for record in caplog.records if record.name == "tprl.scoring.lengths"]


class TestSaid:
    def test_all(self, tmp_path: Path) -> None:
        data = custom(tmp_path, ["a" * 20, "b" * 30])
        with pytest.raises(UserError) as error:
            check_lengths(model(16), data)
        assert str(error.value) == (
            "none of the 2 reference answers of custom can be written within "
            "model.max_new_tokens=16, the longest needs 30 tokens: set model.max_new_tokens=30."
        )
        check_lengths(model(30), data)

    @pytest.mark.parametrize(
        ("training", "effect"), [(False, "they count as wrong"), (True, "their score stays 0")]
    )
    def test_some(
        self, tmp_path: Path, training: bool, effect: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = custom(tmp_path, ["a" * 20, "b", "c"])
        with caplog.at_level(logging.WARNING):
            check_lengths(model(16), data, training=training)
        (record,) = about_lengths(caplog)
        assert "1 of 3 reference answers of custom cannot be written" in record.message
        assert effect in record.message
        assert "set model.max_new_tokens=20" in record.message

    def test_none(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        check_lengths(model(16), custom(tmp_path, ["a", "b"]))
        check_lengths(model(16), Scenes("test"))
        # a model that does not generate
        check_lengths(ToyLVLM(), custom(tmp_path, ["a" * 99]))
        assert not about_lengths(caplog)

    @pytest.mark.parametrize(
        ("coordinates", "length"), [("relative", 28), ("thousand", 20), ("absolute", 24)]
    )
    def test_boxes(self, tmp_path: Path, coordinates: str, length: int) -> None:
        data = custom(tmp_path, [{"box": [1, 1, 20, 20]}] * 2, coordinates=coordinates)
        check_lengths(model(length), data)
        with pytest.raises(UserError, match=f"none of the 2 .* set model.max_new_tokens={length}"):
            check_lengths(model(length - 1), data)


class TestDefault:
    def test_the_dataset_says_how_long(self, tmp_path: Path) -> None:
        boxes = custom(tmp_path, [{"box": [1, 1, 20, 20]}])
        lvlm = model(16, is_set=False)
        fit_length(lvlm, boxes)
        assert lvlm.max_new_tokens == 64
        fit_length(lvlm, custom(tmp_path, ["a"]))
        assert lvlm.max_new_tokens == 64  # never less than an earlier split needs

    def test_the_models_setting_wins(self, tmp_path: Path) -> None:
        lvlm = load_component(
            "model", "qwen2_5_vl", pretrained=None, dtype="float32", max_new_tokens=5
        )
        fit_length(lvlm, custom(tmp_path, [{"box": [1, 1, 20, 20]}]))
        assert (lvlm.max_new_tokens, lvlm.length_is_set) == (5, True)
        free = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
        assert (free.max_new_tokens, free.length_is_set) == (16, False)
