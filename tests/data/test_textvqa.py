"""TextVQA: its accuracy, hints or no hints, its validation images."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_text, encoded, official, write_jsonl

from tprl.data.taking import take
from tprl.data.textvqa import TextVQA

# what ten people say; what the model says; its accuracy
ASKED: list[tuple[dict[str, int], str, float]] = [
    ({"dakota": 7, "dakota digital": 3}, "Dakota Digital", 0.9),
    ({"dakota": 7, "dakota digital": 3}, "dakota.", 1),
    ({"nokia": 10}, "Nokia phone", 0),
    ({"men's": 2, "mens": 8}, "Men's", 0.6),
    ({"1,000": 1, "1000": 1, "100": 8}, "1,000", 0.6),
    ({"the coca-cola": 1, "pepsi": 9}, "Coca-Cola", 0.3),
    ({"two": 4, "unanswerable": 6}, "2", 1),
    ({"": 4, "stop": 1, "go": 5}, "", 1),
]
SAID = [prediction for _, prediction, _ in ASKED]


def rows(images: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "image_id": f"{number % images:016x}",
            "question_id": 34602 + number,
            "question": f"what does sign {number} say?",
            "question_tokens": ["what", "does", "sign", str(number), "say"],
            "image": as_text(encoded(number % images)),
            "image_width": 24,
            "image_height": 16,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [answer for answer, count in answers.items() for _ in range(count)],
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": ["MIND", "THE", "GAP"] if number else [],
        }
        for number, (answers, _, _) in enumerate(ASKED)
    ]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "textvqa.jsonl", rows()))


class TestScore:
    def test_of_each_answer(self, path: str) -> None:
        data = TextVQA(source=path)
        scores = [data.score(data[number], prediction) for number, prediction in enumerate(SAID)]
        assert scores == pytest.approx([score for _, _, score in ASKED])

    def test_the_number(self, path: str) -> None:
        """5.4 of 8."""
        assert official(TextVQA(source=path), SAID) == pytest.approx({"accuracy": 67.5})


class TestRows:
    def test_a_sample_without_hints(self, path: str) -> None:
        data = TextVQA(source=path)
        sample = data[3]
        assert sample.uid == "textvqa/test/0000000000000003/34605"
        assert (
            sample.question
            == "what does sign 3 say?\nAnswer the question using a single word or phrase."
        )
        assert sample.answers == ("mens",) * 8 + ("men's",) * 2
        assert "without OCR words" in data.protocol

    def test_hints_are_in_the_prompt_and_in_the_protocol(self, path: str) -> None:
        data = TextVQA(source=path, ocr_hints=True)
        assert data[3].question == (
            "what does sign 3 say?\nReference OCR token: MIND, THE, GAP\n"
            "Answer the question using a single word or phrase."
        )
        assert "\nReference OCR token: \n" in data[0].question
        assert "with OCR words in the prompt" in data.protocol

    def test_an_empty_answer_is_never_taught(self, path: str) -> None:
        assert TextVQA(source=path)[7].answers == ("go",) * 5 + ("stop",) + ("",) * 4

    def test_validation_images_are_held_out_of_the_training_images(self, tmp_path: Path) -> None:
        plenty = [row for copy in range(25) for row in rows()]
        for number, row in enumerate(plenty):
            row["question_id"], row["image_id"] = number, f"{number // 2:016x}"
        write_jsonl(tmp_path / "train.jsonl", plenty)
        write_jsonl(tmp_path / "validation.jsonl", rows())
        parts = {split: TextVQA(split, source=str(tmp_path)) for split in ("train", "val", "test")}
        images = {
            name: {sample.uid.split("/")[2] for sample in take(part, range(len(part)))}
            for name, part in parts.items()
        }
        assert len(parts["train"]) + len(parts["val"]) == 200
        assert (len(images["train"]), len(images["val"]), len(parts["test"])) == (91, 9, 8)
        assert not images["train"] & images["val"]
        assert len(TextVQA("val", source=str(tmp_path), limit=3)) == 3

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = rows()
        bad[0]["answers"] = []
        bad[1]["question"] = None
        bad[2]["image"] = {"bytes": None, "path": "nowhere.jpg"}
        bad[3]["answers"] = ["", None]
        data = TextVQA(source=str(write_jsonl(tmp_path / "bad.jsonl", bad)), max_bad_rows=0.5)
        assert len(take(data, range(8))) == 4
        assert data.damage == {"no answer": 2, "empty question": 1, "missing image file": 1}
