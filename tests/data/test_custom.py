"""One's own data: text and boxes, how it is divided, and errors that name the row."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from tests.data.rows import encoded, official, picture, write_jsonl

from tprl.data.custom import Custom
from tprl.data.taking import take
from tprl.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images."""
    (tmp_path / "photos").mkdir()
    for number in range(10):
        picture(number, (100, 50)).save(tmp_path / f"photos/{number}.png")
    return tmp_path


def rows() -> list[dict[str, Any]]:
    """Two questions about each image: one in words, one with a box."""
    records: list[dict[str, Any]] = []
    for number in range(10):
        image = f"photos/{number}.png"
        records.append(
            {"image": image, "question": f"What is {number}?", "answers": ["Big Dog", str(number)]}
        )
        records.append({"image": image, "question": "Where is it?", "box": [10, 10, 30, 30]})
    return records


def custom(folder: Path, content: list[dict[str, Any]] | None = None, **options: Any) -> Custom:
    path = write_jsonl(folder / "data.jsonl", rows() if content is None else content)
    arguments: dict[str, Any] = {"split": "all"} | options
    data = Custom(source=str(path), **arguments)
    data.reads_boxes_as(SimpleNamespace(name="m", coordinates="absolute"))
    return data


class TestScore:
    @pytest.mark.parametrize(
        ("prediction", "score"),
        [("big dog", 1), (" Big Dog\n", 1), ("0", 1), ("dog", 0), ("Big Dog.", 0), ("", 0)],
    )
    def test_words_match_but_for_case_and_outer_spaces(
        self, folder: Path, prediction: str, score: float
    ) -> None:
        data = custom(folder)
        assert data.score(data[0], prediction) == score
        assert not data.teacher_forced(data[0])

    def test_the_numbers_of_both_kinds(self, folder: Path) -> None:
        """Right: two of three in words, two of three boxes with IoU 1, 0.5 and 1/3."""
        predictions = [
            "0",
            "[10, 10, 30, 30]",
            "2",
            "(10,10),(20,30)",
            "big dog",
            "[20, 10, 40, 30]",
        ]
        assert official(custom(folder), predictions) == pytest.approx(
            {"accuracy": 66.666667, "mean_iou": 61.111111}
        )

    def test_without_boxes_there_is_no_iou_and_no_coordinates_are_needed(
        self, folder: Path
    ) -> None:
        data = Custom("all", source=str(write_jsonl(folder / "words.jsonl", rows()[::2])))
        assert official(data, ["0", "1", "3"]) == pytest.approx({"accuracy": 66.666667})
        assert (data.answer_tokens, custom(folder).answer_tokens) == (16, 64)


class TestRows:
    def test_samples(self, folder: Path) -> None:
        data = custom(folder)
        words, box = data[4], data[5]
        assert (words.uid, box.uid) == (
            "custom/all/photos/2.png/row5",
            "custom/all/photos/2.png/row6",
        )
        assert (words.question, words.answers, words.box) == ("What is 2?", ("Big Dog", "2"), None)
        assert (box.answers, box.box, box.region) == (
            ("[10, 10, 30, 30]",),
            (10.0, 10.0, 30.0, 30.0),
            ((10.0, 10.0, 30.0, 30.0),),
        )
        assert words.images[0] is box.images[0]

    def test_several_images_one_answer_ids_and_another_folder(self, folder: Path) -> None:
        row = {
            "image": ["1.png", "2.png"],
            "question": "Same?",
            "answers": 7,
            "id": "a/b",
            "box": None,
        }
        path = write_jsonl(folder / "data.jsonl", [row])
        sample = Custom("all", source=str(path), images=str(folder / "photos"))[0]
        assert (sample.uid, sample.answers) == ("custom/all/1.png/a_b", ("7",))
        assert [image.tobytes() for image in sample.images] == [
            picture(n, (100, 50)).tobytes() for n in (1, 2)
        ]

    def test_a_huge_image_is_scaled_down_with_its_box(self, folder: Path) -> None:
        sample = custom(folder, max_pixels=1250)[1]
        assert (sample.images[0].size, sample.box) == ((50, 25), (5.0, 5.0, 15.0, 15.0))

    def test_parquet_with_the_images_inside(self, folder: Path) -> None:
        content = [
            {
                "image": encoded(number, (30, 20)),
                "question": "What?",
                "answers": [str(number)],
                "box": None,
            }
            for number in range(3)
        ]
        content.append(
            {
                "image": encoded(0, (30, 20)),
                "question": "Where?",
                "answers": None,
                "box": [1, 2, 3, 4],
            }
        )
        table = datasets.Dataset.from_list(content).cast_column("image", datasets.Image())
        table.to_parquet(folder / "data.parquet")
        data = Custom("all", source=str(folder / "data.parquet"), coordinates="absolute")
        samples = take(data, range(4))
        assert [sample.answers for sample in samples] == [("0",), ("1",), ("2",), ("[1, 2, 3, 4]",)]
        assert samples[1].images[0].tobytes() == picture(1, (30, 20)).tobytes()
        assert (
            samples[0].uid.split("/")[2]
            == samples[3].uid.split("/")[2]
            != samples[1].uid.split("/")[2]
        )


class TestSplits:
    def test_images_are_divided_and_their_questions_stay_together(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        many = [{"image": f"{n // 3}.png", "question": "?", "answers": "x"} for n in range(3000)]
        with caplog.at_level(logging.INFO):
            parts = {
                split: custom(folder, many, split=split)
                for split in ("train", "val", "test", "all")
            }
        lengths = {name: len(part) for name, part in parts.items()}
        assert lengths == {"train": 2466, "val": 288, "test": 246, "all": 3000}
        assert (
            f"{folder}/data.jsonl has no column split: test 246, train 2466, val 288" in caplog.text
        )
        images = [
            {part.at(i) // 3 for i in range(len(part))}
            for name, part in parts.items()
            if name != "all"
        ]
        assert sum(map(len, images)) == len(set.union(*images)) == 1000

    def test_a_column_decides_where_there_is_one(self, folder: Path) -> None:
        content = [{**row, "split": "dev" if n < 5 else "train"} for n, row in enumerate(rows())]
        assert [len(custom(folder, content, split=name)) for name in ("dev", "train", "all")] == [
            5,
            15,
            20,
        ]
        with pytest.raises(
            UserError,
            match=r"no rows in split val \(dev 5, train 15\): use split=all or another one",
        ):
            custom(folder, content, split="val")
        del content[7]["split"]
        with pytest.raises(
            UserError, match=r"data\.jsonl, line 8: split is missing; give every row one, or none"
        ):
            custom(folder, content)

    def test_too_few_images_for_every_part(self, folder: Path) -> None:
        with pytest.raises(
            UserError, match=r"data\.jsonl has no rows in split val \(train 2\): use split=all"
        ):
            custom(folder, rows()[:2], split="val")


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"question": " "}, "(empty question: question=' '; write a text)"),
            ({"question": 3}, "(empty question: question=3; write a text)"),
            (
                {"image": "photos/77.png"},
                (
                    "(missing image file: FOLDER/photos/77.png does not exist; "
                    "image='photos/77.png' in FOLDER; mend it, or dataset.images)"
                ),
            ),
            ({"image": None}, "(no image: image='' in FOLDER; mend it, or dataset.images)"),
            ({"image": []}, "(no image: image='' in FOLDER; mend it, or dataset.images)"),
            (
                {"image": "data.jsonl"},
                '(broken image: FOLDER/data.jsonl begins with b\'{"image": "p\'; '
                "give PNG, JPEG, WebP or the like; "
                "image='data.jsonl' in FOLDER; mend it, or dataset.images)",
            ),
            ({"box": None}, "(no answer: answers=None; give a text or a list of texts, or a box)"),
            (
                {"box": None, "answers": ["", None]},
                "(no answer: answers=['', None]; give a text or a list of texts, or a box)",
            ),
            (
                {"answers": "x"},
                "(answers and a box: answers='x', box=[10, 10, 30, 30]; leave one of them out)",
            ),
            (
                {"box": [10, 10, 30]},
                "(no box: box=[10, 10, 30]; give [x1, y1, x2, y2] in pixels)",
            ),
            (
                {"box": "10 10 30 30"},
                "(no box: box='10 10 30 30'; give [x1, y1, x2, y2] in pixels)",
            ),
            (
                {"box": [30, 10, 10, 30]},
                (
                    "(empty box: box=[30, 10, 10, 30]; give [x1, "
                    "y1, x2, y2] with x1 < x2 and y1 < y2, or"
                ),
            ),
            ({"box": [1, 2, None, 3]}, "(no box: box=[1, 2, None, 3]; give"),
            (
                {"box": [100, 0, 120, 20]},
                (
                    "(box outside of the image: box=[100, 0, "
                    "120, 20], and the image is 100 x 50 pixels)"
                ),
            ),
            (
                {"image": ["photos/1.png", "photos/2.png"]},
                "(no box: box=[10, 10, 30, 30] with 2 images; give one image)",
            ),
        ],
    )
    def test_name_line_column_value_and_remedy(
        self, folder: Path, change: dict[str, Any], sentence: str
    ) -> None:
        content = rows()
        content[3] |= change
        data = custom(folder, content)
        with pytest.raises(UserError) as error:
            take(data, range(20))
        start = (
            f"custom: {folder}/data.jsonl, line 4 has a fault "
            f"{sentence.replace('FOLDER', str(folder))}"
        )
        assert str(error.value).startswith(start)
        assert str(error.value).endswith("or raise dataset.max_bad_rows.")

    def test_damaged_rows_are_counted_by_reason(self, folder: Path) -> None:
        content = rows()
        content[1]["box"] = [1, 2]
        content[3]["box"] = [5, 5, 5, 9]
        content[4]["question"] = None
        data = custom(folder, content, max_bad_rows=0.2)
        assert len(take(data, range(20))) == 17
        assert data.damage == {"no box": 1, "empty box": 1, "empty question": 1}

    def test_blank_lines_count_and_other_files_have_rows(self, folder: Path) -> None:
        content = rows()
        content[3]["question"] = ""
        path = write_jsonl(folder / "data.jsonl", content)
        path.write_text("\n\n" + path.read_text())
        with pytest.raises(UserError, match=r"data\.jsonl, line 6 has a fault"):
            take(Custom("all", source=str(path), coordinates="absolute"), range(20))
        both = [{"box": None, "answers": None, **row} for row in content]
        datasets.Dataset.from_list(both).to_parquet(folder / "data.parquet")
        with pytest.raises(UserError, match=r"data\.parquet, row 4 has a fault"):
            take(
                Custom("all", source=str(folder / "data.parquet"), coordinates="absolute"),
                range(20),
            )

    def test_a_missing_column_is_refused_at_once(self, folder: Path) -> None:
        renamed = [{"picture": row["image"], "question": "?", "label": "x"} for row in rows()]
        with pytest.raises(UserError) as error:
            custom(folder, renamed)
        assert str(error.value) == (
            f"{folder}/data.jsonl has no column image, answers (or "
            "box), only label, picture, question: rename or add it."
        )

    def test_an_id_twice_is_refused(self, folder: Path) -> None:
        content = [
            {**row, "id": 7 if number in (2, 11) else number + 100}
            for number, row in enumerate(rows())
        ]
        with pytest.raises(UserError) as error:
            custom(folder, content)
        path = folder / "data.jsonl"
        assert (
            str(error.value)
            == f"{path}, line 12: id=7 is also that of {path}, line 3; give each row its own."
        )

    def test_no_data(self, folder: Path) -> None:
        with pytest.raises(
            UserError,
            match=r"^dataset=custom needs your data: set dataset\.source=<a \.jsonl, \.json, ",
        ):
            Custom()
        with pytest.raises(UserError, match=r"^nowhere\.jsonl is no file: set dataset\.source=<"):
            Custom(source="nowhere.jsonl")
        with pytest.raises(
            UserError, match=r"dataset\.images must be a folder, got /nowhere; use the one"
        ):
            custom(folder, images="/nowhere")
        with pytest.raises(UserError, match=r"data\.jsonl is empty: write at least one row"):
            custom(folder, [])


def test_the_spelling_of_a_path_decides_nothing(folder: Path) -> None:
    content = [row for row in rows() if "answers" in row]
    spelt = [row | {"image": f"./{row['image']}"} for row in content]
    absolute = [row | {"image": str(folder / row["image"])} for row in content]
    records = []
    for arguments in (content, spelt, absolute):
        train = custom(folder, arguments, split="train")
        records.append([sample.uid for sample in take(train, range(len(train)))])
    assert records[0] == records[1] == records[2]
    assert 4 < len(records[0]) < 10
