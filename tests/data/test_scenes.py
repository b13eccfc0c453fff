"""The embedded dataset: the same on every machine, right and balanced."""

import hashlib
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from tprl.data.draws import Stream
from tprl.data.scenes import (
    COLORS,
    FAMILIES,
    SCENES,
    SHAPES,
    SIDE,
    SIZES,
    Question,
    Scene,
    Scenes,
    Thing,
    corners_text,
    draw_scene,
    parse_box,
    pixels_inside,
    scene_pixels,
)


@cache
def drawn(count: int) -> tuple[Scene, ...]:
    return tuple(draw_scene("tests", i) for i in range(count))


@cache
def asked(family: str, count: int = 800) -> tuple[tuple[Scene, Question], ...]:
    return tuple(
        (scene, SCENES.ask[family](scene.things, Stream("asked", i)))
        for i, scene in enumerate(drawn(count))
    )


class TestImages:
    @pytest.mark.parametrize(
        ("split", "index", "digest", "question", "answer"),
        [
            ("train", 0, "ae8f2646a442f6a3", "what size is the purple circle?", "large"),
            ("train", 7, "a533724b3f2cb43b", "how many cross objects are there?", "0"),
            (
                "val",
                3,
                "29216f9de370454d",
                "is the green square above or below the yellow circle?",
                "above",
            ),
            ("test", 4, "668439d4324db4f4", "where is the purple square?", "46 43 56 53"),
            ("test", 1001, "3310c14461e92459", "is there a red circle?", "yes"),
        ],
    )
    def test_the_same_on_every_machine(
        self, split: str, index: int, digest: str, question: str, answer: str
    ) -> None:
        sample = Scenes(split)[index]
        assert hashlib.sha256(sample.images[0].tobytes()).hexdigest()[:16] == digest
        assert (sample.question, sample.answers) == (question, (answer,))

    def test_a_picture_is_rgb_and_belongs_to_all_its_questions(self) -> None:
        data = Scenes("val")
        first = data[10].images[0]
        assert (first.mode, first.size) == ("RGB", (SIDE, SIDE))
        assert all(data[i].images[0].tobytes() == first.tobytes() for i in range(10, 15))

    def test_three_to_six_objects_of_every_kind(self) -> None:
        counts = Counter(len(scene.things) for scene in drawn(800))
        assert sorted(counts) == [3, 4, 5, 6]
        assert min(counts.values()) > 160
        things = [thing for scene in drawn(800) for thing in scene.things]
        for values, all_of_them in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
            seen = Counter(getattr(thing, values) for thing in things)
            assert set(seen) == set(all_of_them)
            assert min(seen.values()) > 0.8 * len(things) / len(all_of_them)

    def test_objects_lie_inside_apart_and_look_different(self) -> None:
        for scene in drawn(800):
            taken = np.zeros((SIDE, SIDE), dtype=int)
            for thing in scene.things:
                x1, y1, x2, y2 = map(int, thing.box)
                assert 0 <= x1 < x2 <= SIDE
                assert 0 <= y1 < y2 <= SIDE
                low, high = SIZES[thing.size]
                assert 2 * low <= x2 - x1 == y2 - y1 <= 2 * high
                taken[y1:y2, x1:x2] += 1
            assert taken.max() == 1
            assert len({(thing.color, thing.shape) for thing in scene.things}) == len(scene.things)

    def test_the_object_shows_its_color(self) -> None:
        """The mean color of an object's pixels is nearest to its own name's, in nearly every
        case."""
        right = [
            min(COLORS, key=lambda name: float(((mean - np.array(COLORS[name])) ** 2).sum()))
            == thing.color
            for scene in drawn(40)
            for thing in scene.things
            for mean in [scene.pixels[pixels_inside(thing)].mean(0)]
        ]
        assert np.mean(right) > 0.98

    def test_the_background_is_noisy_and_hides_no_object(self) -> None:
        scene = drawn(1)[0]
        background = ~np.any([pixels_inside(thing) for thing in scene.things], axis=0)
        assert scene.pixels[background].std(0).min() > 5
        bare = scene_pixels(Scene(scene.key, ()))
        assert not np.array_equal(bare[~background], scene.pixels[~background])


class TestInside:
    @pytest.mark.parametrize(
        ("shape", "rows"),
        [
            ("square", ["11111111"] * 8),
            # center (4, 4): half-side 4; pixel centers within 4 of it
            (
                "circle",
                [
                    "00111100",
                    "01111110",
                    "11111111",
                    "11111111",
                    "11111111",
                    "11111111",
                    "01111110",
                    "00111100",
                ],
            ),
            # apex up: the width of a row grows by one pixel per pixel of depth
            (
                "triangle",
                [
                    "00000000",
                    "00011000",
                    "00011000",
                    "00111100",
                    "00111100",
                    "01111110",
                    "01111110",
                    "11111111",
                ],
            ),
            # arms as wide as 2/5 of the side: |2x + 1 - 8| <= 2 * 8 // 5 = 3
            (
                "cross",
                [
                    "00111100",
                    "00111100",
                    "11111111",
                    "11111111",
                    "11111111",
                    "11111111",
                    "00111100",
                    "00111100",
                ],
            ),
        ],
    )
    def test_literal_masks(self, shape: str, rows: list[str]) -> None:
        mask = pixels_inside(Thing("red", shape, "small", 24, 14, 4))
        expected = np.zeros((SIDE, SIDE), dtype=bool)
        expected[10:18, 20:28] = [[c == "1" for c in row] for row in rows]
        assert np.array_equal(mask, expected)

    def test_masks_stay_in_the_box_and_fill_a_good_part(self) -> None:
        for scene in drawn(30):
            for thing in scene.things:
                mask = pixels_inside(thing)
                x1, y1, x2, y2 = map(int, thing.box)
                assert mask.sum() == mask[y1:y2, x1:x2].sum() >= 0.45 * (x2 - x1) * (y2 - y1)
                # all shapes are symmetric
                assert np.array_equal(mask[y1:y2, x1:x2], mask[y1:y2, x1:x2][:, ::-1])


def naive_answer(things: tuple[Thing, ...], text: str) -> str:
    """The answer read off the question's words alone, by rules written apart from those that asked
    it."""
    words = re.findall(r"\w+", text)

    def named(part: list[str]) -> list[Thing]:
        """The objects that carry every attribute word of `part`."""
        known = [w for w in part if w in COLORS or w in SHAPES or w in SIZES]
        return [t for t in things if set(known) <= {t.color, t.shape, t.size}]

    match words[:2]:
        case ["what", kind]:
            (thing,) = named(words[2:])
            return getattr(thing, kind)
        case ["is", "there"]:
            return "yes" if named(words) else "no"
        case ["how", "many"]:
            return str(len(named(words)))
        case ["where", "is"]:
            (thing,) = named(words)
            return (
                f"{thing.x - thing.half} {thing.y - thing.half} "
                f"{thing.x + thing.half} {thing.y + thing.half}"
            )
        case ["is", "the"]:
            split = words.index("or")
            ((a,), (b,)) = named(words[:split]), named(words[split:])
            truth = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
            (answer,) = [word for word in (words[split - 1], words[split + 1]) if truth[word]]
            return answer
    raise AssertionError(text)


class TestQuestions:
    def test_answers_are_right(self) -> None:
        for family in FAMILIES:
            for scene, question in asked(family)[:300]:
                assert question.answer == naive_answer(scene.things, question.text), question
                assert question.family == family

    def test_the_dataset_asks_about_its_own_picture(self) -> None:
        """Questions of a split, answered from the scene whose pixels they show."""
        data = Scenes("val")
        for i in range(100):
            scene = draw_scene("scenes", "val", 0, i // 5)
            assert np.array_equal(np.asarray(data[i].images[0]), scene_pixels(scene))
            assert data[i].answers == (naive_answer(scene.things, data[i].question),)

    def test_a_no_is_a_hard_negative(self) -> None:
        negatives = [(scene, q) for scene, q in asked("existence") if q.answer == "no"]
        for scene, question in negatives:
            color, shape = question.text.removeprefix("is there a ").removesuffix("?").split()
            assert color in {thing.color for thing in scene.things}
            assert shape in {thing.shape for thing in scene.things}
        assert len(negatives) > 320

    @pytest.mark.parametrize(
        ("family", "item", "other"),
        [
            ("existence", "yes", "no"),
            ("relation", "left", "right"),
            ("relation", "above", "below"),
            ("attribute", "small", "large"),
        ],
    )
    def test_both_answers_are_as_likely(self, family: str, item: str, other: str) -> None:
        counts = Counter(question.answer for _, question in asked(family))
        share = counts[item] / (counts[item] + counts[other])
        assert share == pytest.approx(0.5, abs=0.06)
        assert counts[item] + counts[other] > 320

    def test_no_answer_dominates_its_family(self) -> None:
        attribute = Counter(question.answer for _, question in asked("attribute"))
        assert set(attribute) == {*COLORS, *SHAPES, *SIZES}
        assert max(attribute[name] for name in COLORS) < 2 * min(attribute[name] for name in COLORS)
        assert max(attribute[name] for name in SHAPES) < 2 * min(attribute[name] for name in SHAPES)
        count = Counter(question.answer for _, question in asked("count"))
        assert set(count) == set("0123456")
        assert max(count.values()) < 0.35 * count.total()

    def test_a_relation_is_asked_along_the_longer_distance(self) -> None:
        for _, question in asked("relation")[:200]:
            a, b = question.region
            dx, dy = abs(a[0] + a[2] - b[0] - b[2]), abs(a[1] + a[3] - b[1] - b[3])
            assert ("left" in question.text) == (dx >= dy)

    def test_a_box_is_asked_for_in_grounding_only(self) -> None:
        for family in FAMILIES:
            for _, question in asked(family)[:50]:
                assert question.box == (
                    parse_box(question.answer) if family == "grounding" else None
                )


class TestRegions:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_region_is_made_of_objects(self, family: str) -> None:
        for scene, question in asked(family)[:200]:
            assert len(set(question.region)) == len(question.region) > 0
            assert set(question.region) <= {thing.box for thing in scene.things}

    def test_one_object_decides_attribute_and_grounding(self) -> None:
        for family in ("attribute", "grounding"):
            for scene, question in asked(family)[:200]:
                (thing,) = [t for t in scene.things if t.box == question.region[0]]
                assert question.answer in (
                    thing.color,
                    thing.shape,
                    thing.size,
                    corners_text(thing.box),
                )
                assert len(question.region) == 1

    def test_existence_shows_the_object_or_all_that_could_be_it(self) -> None:
        for scene, question in asked("existence")[:200]:
            color, shape = question.text.removeprefix("is there a ").removesuffix("?").split()
            if question.answer == "yes":
                expected = {t.box for t in scene.things if (t.color, t.shape) == (color, shape)}
            else:
                expected = {t.box for t in scene.things if t.color == color or t.shape == shape}
            assert set(question.region) == expected

    def test_counting_shows_what_is_counted_or_everything(self) -> None:
        for scene, question in asked("count")[:200]:
            assert len(question.region) == (int(question.answer) or len(scene.things))

    def test_a_relation_shows_its_two_objects_in_the_order_named(self) -> None:
        for scene, question in asked("relation")[:200]:
            names = [
                f"{t.color} {t.shape}"
                for box in question.region
                for t in scene.things
                if t.box == box
            ]
            assert [question.text.index(name) for name in names] == sorted(
                question.text.index(name) for name in names
            )
            assert len(names) == 2
