"""GQA: questions joined with their images, exact match."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_hub, as_text, encoded, official, picture, write_jsonl

from tprl.data.gqa import GQA
from tprl.data.taking import take
from tprl.errors import UserError

# answer, what the model says, whether it is right
ASKED = [
    ("no", "No", 1),
    ("yes", "yes.", 1),
    ("yes", "yeah", 0),
    ("left", " Left\n", 1),
    ("t-shirt", "T-shirt!", 1),
    ("t-shirt", "t shirt", 0),
    ("dog", "the dog", 0),
    ("dog", "a dog.", 0),
    ("girl", "girls", 0),
    ("two", "2", 0),
]
SAID = [prediction for _, prediction, _ in ASKED]


def write(
    folder: Path, split: str = "testdev", questions: list[dict[str, Any]] | None = None
) -> str:
    """The tables of one split; three images, of which the last is asked first."""
    images = [{"id": f"n{place}", "image": as_text(encoded(place))} for place in range(3)]
    for name, rows in (("images", images), ("instructions", questions or asked())):
        (folder / f"{split}_balanced_{name}").mkdir(parents=True)
        write_jsonl(folder / f"{split}_balanced_{name}/{split}.jsonl", rows)
    return str(folder)


def asked() -> list[dict[str, Any]]:
    return [
        {
            "id": f"2013070{number:02}",
            "imageId": f"n{2 - number // 4}",
            "question": f"Is it thing {number}?",
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "isBalanced": True,
            "groups": {"global": None, "local": "13-thing"},
            "entailed": "[]",
            "equivalent": "['x']",
            "types": {"structural": "verify", "semantic": "rel", "detailed": "existRelS"},
            "annotations": {"question": [], "answer": [], "fullAnswer": []},
            "semantic": [{"operation": "select", "argument": "thing", "dependencies": []}],
            "semanticStr": "select: thing",
        }
        for number, (answer, _, _) in enumerate(ASKED)
    ]


class TestScore:
    def test_exact_match_but_for_case_and_punctuation(self, tmp_path: Path) -> None:
        data = GQA(source=write(tmp_path))
        assert [data.score(data[i], prediction) for i, prediction in enumerate(SAID)] == [
            right for _, _, right in ASKED
        ]
        assert official(data, SAID) == pytest.approx({"accuracy": 40})


class TestRows:
    def test_a_question_comes_with_its_image(self, tmp_path: Path) -> None:
        data = GQA(source=write(tmp_path))
        sample = data[1]
        assert sample.uid == "gqa/test/n2/201307001"
        assert (
            sample.question == "Is it thing 1?\nAnswer the question using a single word or phrase."
        )
        assert sample.answers == ("yes",)
        assert sample.images[0].tobytes() == picture(2).tobytes()
        assert sample.images[0] is data[0].images[0]
        assert data[9].images[0].tobytes() == picture(0).tobytes()

    def test_the_same_from_parquet(self, tmp_path: Path) -> None:
        folder = Path(write(tmp_path))
        images = as_hub([{"id": f"n{place}", "image": encoded(place)} for place in range(3)])
        (folder / "testdev_balanced_images/testdev.jsonl").unlink()
        images.to_parquet(folder / "testdev_balanced_images/testdev.parquet")
        assert GQA(source=str(folder))[1].images[0].tobytes() == picture(2).tobytes()

    def test_each_split_has_its_own_tables(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            write(tmp_path, split, asked()[: 3 if split == "val" else 5])
        assert (len(GQA("train", source=str(tmp_path))), len(GQA("val", source=str(tmp_path)))) == (
            5,
            3,
        )

    def test_a_single_file_has_the_images_itself(self, tmp_path: Path) -> None:
        rows = [{**row, "image": as_text(encoded(7))} for row in asked()]
        data = GQA(source=str(write_jsonl(tmp_path / "gqa.jsonl", rows)))
        assert len(take(data, range(10))) == 10

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = asked()
        bad[0]["imageId"] = "n7"
        bad[1]["answer"] = None
        bad[2]["question"] = ""
        data = GQA(source=write(tmp_path, questions=bad), max_bad_rows=0.3)
        assert len(take(data, range(10))) == 7
        assert data.damage == {"no image": 1, "no answer": 1, "empty question": 1}

    def test_questions_without_answers_are_refused(self, tmp_path: Path) -> None:
        bad = [{key: value for key, value in row.items() if key != "answer"} for row in asked()]
        with pytest.raises(
            UserError, match=r"gqa: row 0 has a fault \(no column 'answer'\), and with it 1 of 10"
        ):
            take(GQA(source=write(tmp_path, questions=bad)), range(10))
