"""RefCOCO: every expression a question, boxes in every convention, Acc@0.5 and mean IoU by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.data.rows import as_hub, as_text, encoded, official, write_jsonl

from tprl.data.refcoco import RefCOCO
from tprl.data.taking import take
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM

SAID = [
    "[0.1, 0.2, 0.3, 0.6]",  # the box itself
    "(0.2,0.2),(0.4,0.6)",  # half of it: 200 of 600 pixels
    '{"bbox_2d": [1.0, 1.0, 0.5, 0.0]}',  # corners swapped
    "It is at [0, 0, 1, 0.25] or [0, 0, 1, 0.5].",  # the first: 800 of 1600
    "[0, 0, 40, 40]",  # pixels, read as fractions: 1600 of 5,120,000
    "the left one",
]


def rows() -> list[dict[str, Any]]:
    """Three regions of two images, with two, one and three expressions."""
    regions = [
        (1, 0, (100, 50), [10.0, 10.0, 20.0, 20.0], ["left dog", "the dog"]),
        (1, 1, (100, 50), [50.0, 0.0, 50.0, 50.0], ["right half"]),
        (2, 0, (40, 80), [0, 0, 40, 40], ["top", "upper half", "sky"]),
    ]
    return [
        {
            "question_id": str(1719310 + place),
            "image": as_text(encoded(image, size)),
            "question": (
                "Please carefully observe the area circled in the image and come up with a caption."
            ),
            "answer": expressions,
            "segmentation": [0.0, 0.0, 1.0, 1.0],
            "bbox": box,
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{image:012}_{number}.jpg",
        }
        for place, (image, number, size, box, expressions) in enumerate(regions)
    ]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "refcoco.jsonl", rows()))


class TestScore:
    def test_the_numbers_of_six_answers(self, path: str) -> None:
        """IoU 1, 1/3, 1, 1/2, 1/3200, 0: three of six reach a half; their sum is 2.8336458."""
        data = RefCOCO(source=path, coordinates="relative")
        expected = {"accuracy": 50, "mean_iou": 47.227431}
        assert official(data, SAID) == pytest.approx(expected, abs=1e-5)
        assert [data.score(data[i], prediction) for i, prediction in enumerate(SAID)] == [
            1,
            0,
            1,
            1,
            0,
            0,
        ]
        assert data.iou(data[1], SAID[1]) == pytest.approx(1 / 3)
        assert data.headline in expected

    def test_a_point_is_no_box(self, path: str) -> None:
        data = RefCOCO(source=path, coordinates="relative")
        assert data.score(data[0], "(0.2, 0.4)") == data.iou(data[0], "(0.2, 0.4)") == 0

    @pytest.mark.parametrize(
        ("coordinates", "text", "words"),
        [
            ("absolute", "[10, 10, 30, 30]", "in pixels"),
            (
                "relative",
                "[0.100, 0.200, 0.300, 0.600]",
                "as fractions of the image's width and height, between 0 and 1",
            ),
            (
                "thousand",
                "[100, 200, 300, 600]",
                "on a scale from 0 to 1000 for the image's width and height",
            ),
            ("resized", "[5, 20, 15, 60]", "in pixels"),  # of 50 x 100
        ],
    )
    def test_each_convention_asks_writes_and_reads_its_own(
        self, path: str, coordinates: str, text: str, words: str
    ) -> None:
        """An LVLM that sees half of the width and twice the height."""
        lvlm = SimpleNamespace(
            name="m", coordinates=coordinates, seen_size=lambda w, h: (w // 2, 2 * h)
        )
        data = RefCOCO(source=path)
        data.reads_boxes_as(lvlm)
        sample = data[0]
        assert sample.question == (
            "Please provide the bounding box coordinate of the region this sentence "
            f"describes: left dog\nAnswer with one box [x1, y1, x2, y2] {words}."
        )
        assert sample.answers == (text,)
        assert data.iou(sample, text) == pytest.approx(1)
        assert data.protocol.startswith(
            "refcoco Acc@0.5 of the answer's first box, asked for one per expression"
        )
        assert data.protocol.endswith(f"; boxes in {coordinates} coordinates")
        others = {
            "[10, 10, 30, 30]",
            "[0.1, 0.2, 0.3, 0.6]",
            "[100, 200, 300, 600]",
            "[5, 20, 15, 60]",
        } - {text}
        exact = [other for other in others if data.iou(sample, other) > 0.999]
        assert exact == (["[0.1, 0.2, 0.3, 0.6]"] if coordinates == "relative" else [])


class TestConvention:
    def test_an_explicit_convention_overrides_the_models(self, path: str) -> None:
        data = RefCOCO(source=path, coordinates="absolute")
        data.reads_boxes_as(SimpleNamespace(name="m", coordinates="thousand"))
        assert data[0].answers == ("[10, 10, 30, 30]",)

    def test_an_unknown_convention_of_the_model_is_refused(self, path: str) -> None:
        data = RefCOCO(source=path)
        data.reads_boxes_as(ToyLVLM())
        with pytest.raises(
            UserError,
            match=r"boxes in answers to refcoco are unknown: set dataset\.coordinates to one",
        ):
            data[0]

    def test_resized_needs_a_model_that_says_how(self, path: str) -> None:
        data = RefCOCO(source=path, coordinates="resized")
        data.reads_boxes_as(ToyLVLM())
        with pytest.raises(
            UserError, match=r"coordinates=resized needs the size .* and toy does not say it"
        ):
            data[0]

    def test_an_invalid_convention_is_refused(self, path: str) -> None:
        with pytest.raises(
            UserError, match=r"dataset\.coordinates must be one of absolute, .*, got percent"
        ):
            RefCOCO(source=path, coordinates="percent")


class TestRows:
    def test_every_expression_is_a_question(self, path: str) -> None:
        data = RefCOCO(source=path, coordinates="absolute")
        samples = take(data, range(len(data)))
        assert [sample.uid for sample in samples] == [
            "refcoco/test/COCO_train2014_000000000001.jpg/0-0",
            "refcoco/test/COCO_train2014_000000000001.jpg/0-1",
            "refcoco/test/COCO_train2014_000000000001.jpg/1-0",
            "refcoco/test/COCO_train2014_000000000002.jpg/2-0",
            "refcoco/test/COCO_train2014_000000000002.jpg/2-1",
            "refcoco/test/COCO_train2014_000000000002.jpg/2-2",
        ]
        assert [sample.box for sample in samples[1:4]] == [
            (10.0, 10.0, 30.0, 30.0),
            (50.0, 0.0, 100.0, 50.0),
            (0.0, 0.0, 40.0, 40.0),
        ]
        assert ": upper half\n" in samples[4].question
        assert samples[0].images[0] is samples[2].images[0]
        assert len(RefCOCO(source=path, limit=4)) == 4

    def test_the_same_from_parquet(self, path: str, tmp_path: Path) -> None:
        sizes = {1: (100, 50), 2: (40, 80)}
        stored = [
            {**row, "image": encoded(number, sizes[number])}
            for row, number in zip(rows(), (1, 1, 2), strict=True)
        ]
        as_hub(stored).to_parquet(tmp_path / "testA.parquet")
        result = RefCOCO(source=str(tmp_path), coordinates="absolute")
        expected = RefCOCO(source=path, coordinates="absolute")
        assert len(result) == 6
        for first, other in zip(take(result, range(6)), take(expected, range(6)), strict=True):
            assert first[0:1] + first[2:] == other[0:1] + other[2:]
            assert first.images[0].tobytes() == other.images[0].tobytes()

    def test_a_huge_image_is_scaled_down_with_its_box(self, path: str) -> None:
        # a quarter of 100 x 50
        sample = RefCOCO(source=path, coordinates="absolute", max_pixels=1250)[0]
        assert sample.images[0].size == (50, 25)
        assert sample.box == (5.0, 5.0, 15.0, 15.0)
        assert sample.answers == ("[5, 5, 15, 15]",)

    def test_variants_and_their_splits(self, tmp_path: Path) -> None:
        for number, split in enumerate(("testA", "testB", "test", "val")):
            write_jsonl(tmp_path / f"{split}.jsonl", rows()[: 1 + number % 3])
        source = str(tmp_path)
        lengths = {
            name: len(RefCOCO(name, source=source))
            for name in ("refcoco", "refcoco_plus", "refcocog")
        }
        assert lengths == {"refcoco": 2, "refcoco_plus": 2, "refcocog": 6}
        assert len(RefCOCO("refcoco", "testB", source=source)) == 3
        assert len(RefCOCO("refcoco", "val", source=source)) == 2
        result = RefCOCO("refcocog", source=source, coordinates="absolute")
        assert (result.hub, result[0].uid.split("/")[0]) == ("lmms-lab/RefCOCOg", "refcocog")
        with pytest.raises(
            UserError,
            match=r"dataset\.variant must be one of refcoco, refcoco_plus, refcocog, got grefcoco",
        ):
            RefCOCO("grefcoco")
        with pytest.raises(
            UserError, match="refcoco has no labelled split 'train', only val, test"
        ):
            RefCOCO(split="train", source=source)

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = [*rows(), *rows()[:2]]
        bad[0]["answer"] = []
        bad[1]["bbox"] = None
        bad[2]["answer"] = ["top", " ", None]
        bad[3] = {**bad[3], "bbox": [10, 10, 0, 20]}
        bad[4] = {**bad[4], "image": None, "file_name": "COCO_train2014_000000000009_1.jpg"}
        path = str(write_jsonl(tmp_path / "bad.jsonl", bad))
        data = RefCOCO(source=path, coordinates="absolute", max_bad_rows=0.9)
        assert len(data) == 8
        assert [sample.uid[-3:] for sample in take(data, range(8))] == ["2-0"]
        assert data.damage == {"empty question": 3, "no box": 1, "empty box": 2, "no image": 1}
