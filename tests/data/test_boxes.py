"""Boxes and points in free text, and the coordinates they are written in."""

import pytest

from tprl.data.boxes import box_text, first_box, first_place, in_pixels, inside, iou, unit

BOX = (1.0, 2.0, 30.0, 40.0)


class TestReading:
    @pytest.mark.parametrize(
        "text",
        [
            "[1, 2, 30, 40]",
            "[1,2,30,40]",
            "(1, 2, 30, 40)",
            "[ 1 2 30 40 ]",
            "[1.0, 2., 30.00, +40]",
            "(1,2),(30,40)",
            "(1, 2), (30, 40)",
            "(1,2)(30,40)",
            "[[1, 2], [30, 40]]",
            "[[1, 2, 30, 40]]",
            '{"bbox_2d": [1, 2, 30, 40]}',
            '```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "dog 7"}\n]\n```',
            "<box>[[1, 2, 30, 40]]</box>",
            "<box>(1,2),(30,40)</box>",
            "<box>1 2 30 40</box>",
            "<ref>the 2nd dog</ref><box>[[1, 2, 30, 40]]</box>",
            "1 2 30 40",
            " 1, 2, 30, 40.\n",
            "It is at [1, 2, 30, 40], not at [5, 6, 7, 8].",
            "[30, 40, 1, 2]",
            "(30,2),(1,40)",
            "3 dogs, the left one at\n[1,\n 2,\n 30,\n 40]",
        ],
    )
    def test_a_box(self, text: str) -> None:
        assert first_place(text) == first_box(text) == BOX

    @pytest.mark.parametrize(
        "text",
        [
            "(3, 4)",
            "[3, 4]",
            "<point>3 4</point>",
            '{"point_2d": [3, 4]}',
            "3, 4",
            "3 4\n",
            "click(3,4)",
        ],
    )
    def test_a_point_is_a_place_and_no_box(self, text: str) -> None:
        assert first_box(text) is None
        assert first_place(text) == (3.0, 4.0)

    def test_the_first_place_wins_and_a_box_may_follow_a_point(self) -> None:
        text = "I click (3, 4) in [1, 2, 30, 40]."
        assert first_place(text) == (3.0, 4.0)
        assert first_box(text) == BOX
        assert first_place("In [1, 2, 30, 40] I click (3, 4).") == BOX
        assert first_place("(3, 4) and then (30, 40)") == (3.0, 4.0)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no",
            "1 2 30",
            "[1, 2, 30",
            "[1, 2, 30, 40",
            "[1, 2, 30, 40, 50]",
            "[1, 2, 30]",
            "1 dog and 2 cats",
            "at 1, 2, 30, 40 or so",
            "[a, b, c, d]",
            "x=3, y=4",
            "[1.2.3, 4, 5, 6]",
            "<box></box>",
        ],
    )
    def test_nothing_to_read(self, text: str) -> None:
        assert first_place(text) is None
        assert first_box(text) is None

    def test_fractions_and_negative_numbers(self) -> None:
        assert first_box("[-0.5, .25, 0.5, 1.]") == (-0.5, 0.25, 0.5, 1.0)


class TestCoordinates:
    """An image of 200 x 50 that the processor makes 100 x 100."""

    @pytest.mark.parametrize(
        ("coordinates", "written"),
        [
            ("absolute", (20.0, 10.0, 100.0, 40.0)),
            ("relative", (0.1, 0.2, 0.5, 0.8)),
            ("thousand", (100.0, 200.0, 500.0, 800.0)),
            ("resized", (10.0, 20.0, 50.0, 80.0)),
        ],
    )
    def test_the_same_box_in_each(self, coordinates: str, written: tuple[float, ...]) -> None:
        pixels = unit(coordinates, (200, 50), (100, 100))
        assert in_pixels(written, pixels) == pytest.approx((20, 10, 100, 40))
        assert in_pixels(written[:2], pixels) == pytest.approx((20, 10))
        text = box_text((20.0, 10.0, 100.0, 40.0), coordinates, pixels)
        assert first_box(text) == pytest.approx(written)

    def test_how_a_box_is_written(self) -> None:
        box = (1.0, 2.0, 66.6, 50.0)
        assert (
            box_text(box, "relative", unit("relative", (200, 50), (1, 1)))
            == "[0.005, 0.040, 0.333, 1.000]"
        )
        assert (
            box_text(box, "thousand", unit("thousand", (200, 50), (1, 1))) == "[5, 40, 333, 1000]"
        )
        assert box_text(box, "absolute", unit("absolute", (200, 50), (1, 1))) == "[1, 2, 67, 50]"


class TestGeometry:
    def test_iou(self) -> None:
        assert iou((0.0, 0.0, 2.0, 2.0), (1.0, 0.0, 3.0, 2.0)) == pytest.approx(1 / 3)
        assert iou((0.0, 0.0, 2.0, 2.0), (2.0, 0.0, 3.0, 2.0)) == 0
        assert iou((1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 2.0, 2.0)) == 0

    @pytest.mark.parametrize(
        ("place", "hit"),
        [
            ((5.0, 5.0), True),
            ((0.0, 10.0), True),
            ((10.0, 0.0), True),
            ((10.1, 5.0), False),
            ((5.0, -0.1), False),
            ((0.0, 0.0, 20.0, 20.0), True),  # its center is the corner
            ((0.0, 0.0, 21.0, 1.0), False),
            ((4.0, 4.0, 6.0, 6.0), True),
        ],
    )
    def test_inside(self, place: tuple[float, ...], hit: bool) -> None:
        assert inside(place, (0.0, 0.0, 10.0, 10.0)) == hit
