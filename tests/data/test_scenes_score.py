"""Answers as text, boxes, and the score of the embedded dataset."""

import pytest

from tprl.data.scenes import (
    Scene,
    Scenes,
    Thing,
    corners_text,
    describe,
    draw_scene,
    iou,
    parse_box,
)


class TestText:
    def test_captions_name_every_object_in_raster_order(self) -> None:
        things = (
            Thing("red", "cross", "small", 28, 69, 7),
            Thing("cyan", "circle", "large", 30, 24, 10),
        )
        assert (
            describe(Scene(("k",), things))
            == "large cyan circle 20 14 40 34 , small red cross 21 62 35 76"
        )

    @pytest.mark.parametrize(
        ("text", "box"),
        [
            ("1 2 30 40", (1.0, 2.0, 30.0, 40.0)),
            ("  1\t2 30\n40 ", (1.0, 2.0, 30.0, 40.0)),
            ("30 40 1 2", (30.0, 40.0, 1.0, 2.0)),
            ("0 0 0 0", (0.0, 0.0, 0.0, 0.0)),
            ("", None),
            ("1 2 3", None),
            ("1 2 3 4 5", None),
            ("1 2 3 x", None),
            ("-1 2 3 4", None),
            ("1.5 2 3 4", None),
            ("1,2,3,4", None),
            ("² 2 3 4", None),
            ("inf nan 3 4", None),
        ],
    )
    def test_parse_box(self, text: str, box: tuple[float, ...] | None) -> None:
        assert parse_box(text) == box

    def test_a_box_survives_its_text(self) -> None:
        assert all(
            parse_box(corners_text(t.box)) == t.box
            for i in range(50)
            for t in draw_scene("tests", i).things
        )

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
            ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
            ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
            ((0, 0, 10, 10), (2, 2, 4, 4), 0.04),
            ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # x2 is exclusive: they touch
            ((0, 0, 10, 10), (40, 40, 50, 50), 0.0),
            ((5, 5, 5, 5), (0, 0, 10, 10), 0.0),
            ((8, 8, 2, 2), (0, 0, 10, 10), 0.0),  # corners swapped
        ],
    )
    def test_iou(self, a: tuple[int, ...], b: tuple[int, ...], expected: float) -> None:
        first, second = tuple(map(float, a)), tuple(map(float, b))
        assert iou(first, second) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]
        assert iou(second, first) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]


class TestScore:
    def test_words_must_match_exactly_but_for_case_and_outer_spaces(self) -> None:
        data, sample = Scenes("train"), Scenes("train")[0]
        assert sample.answers == ("large",)
        predictions = ["large", " Large\n", "LARGE", "large circle", "larg", "", "small", "large ."]
        assert [data.score(sample, p) for p in predictions] == [1, 1, 1, 0, 0, 0, 0, 0]
        assert data.teacher_forced(sample)

    def test_a_box_must_overlap_by_half(self) -> None:
        data, sample = Scenes("test"), Scenes("test")[4]
        assert sample.box == (46, 43, 56, 53)
        # shifted by 3 columns: 70 / 130 = 0.54; by 4: 60 / 140 = 0.43; half of it: exactly 0.5
        predictions = [
            "46 43 56 53",
            "49 43 59 53",
            "50 43 60 53",
            "46 43 51 53",
            "46 43 56",
            "purple",
            "56 53 46 43",
        ]
        assert [data.score(sample, p) for p in predictions] == [1, 1, 0, 1, 0, 0, 0]
        assert data.iou(sample, predictions[1]) == pytest.approx(70 / 130)
        assert data.iou(sample, "purple") == 0.0
        assert not data.teacher_forced(sample)

    def test_the_reference_answer_is_right(self) -> None:
        data = Scenes("test")
        assert all(data.score(data[i], data[i].answers[0]) == 1.0 for i in range(50))
