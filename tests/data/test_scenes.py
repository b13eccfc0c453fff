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
from tprl.errors import UserError


@cache
def drawn(count: int) -> tuple[Scene, ...]:
    return tuple(draw_scene("tests", i) for i in range(count))


@cache
def asked(family: str, count: int = 800) -> tuple[tuple[Scene, Question], ...]:
    return tuple(
        (scene, SCENES.ask[family](scene.things, Stream("asked", i)))
        for i, scene in enumerate(drawn(count))
    )


class TestStream:
    def test_draws_never_change(self) -> None:
        stream = Stream("golden", 1)
        assert [stream.integer(0, 9) for _ in range(12)] == [1, 9, 5, 2, 2, 4, 0, 2, 5, 5, 3, 1]
        assert stream.integers(-2, 2, (2, 3)).tolist() == [[2, -1, 0], [2, 1, 1]]
        assert stream.choice("abc") == "c"
        assert stream.shuffled([1, 2, 3, 4, 5]) == [5, 1, 2, 4, 3]

    def test_integers_are_uniform_between_both_ends(self) -> None:
        values = Stream("uniform").integers(-3, 4, (8000,))
        counts = Counter(values.tolist())
        assert sorted(counts) == list(range(-3, 5))
        assert max(abs(n - 1000) for n in counts.values()) < 5 * 1000**0.5

    def test_one_draw_is_the_array_of_one(self) -> None:
        one, many = Stream("k"), Stream("k")
        assert [one.integer(5, 60) for _ in range(50)] == many.integers(5, 60, (50,)).tolist()

    def test_a_permutation_reaches_every_order(self) -> None:
        stream = Stream("orders")
        orders = Counter(tuple(stream.shuffled("abc")) for _ in range(1200))
        assert len(orders) == 6
        assert min(orders.values()) > 130

    def test_keys_do_not_run_into_each_other(self) -> None:
        draws = {
            tuple(Stream(*key).integers(0, 10**9, (2,)).tolist())
            for key in [("a", 1, 23), ("a", 12, 3), ("a", 123)]
        }
        assert len(draws) == 3


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


class TestSplits:
    def test_sizes_and_uids(self) -> None:
        assert {split: len(Scenes(split)) for split in SCENES.splits} == {
            "train": 1_000_000,
            "val": 2_000,
            "test": 6_000,
            "final": 6_000,
        }
        assert Scenes("test")[5999].uid == "scenes/test/1199/grounding"
        assert Scenes("train", seed=3)[2].uid == "scenes/train-3/0/count"

    def test_disjoint(self) -> None:
        sets = [Scenes("train"), Scenes("train", seed=1), Scenes("val"), Scenes("test")]
        samples = [data[i] for data in sets for i in range(0, 300, 5)]
        assert len({sample.uid for sample in samples}) == len(samples) == 240
        assert len({sample.images[0].tobytes() for sample in samples}) == len(samples)

    def test_pretraining_never_sees_a_scene_of_a_split(self) -> None:
        pretrain = {
            draw_scene("pretrain", 0, step, i).things for step in range(30) for i in range(4)
        }
        assert not pretrain & {
            draw_scene("scenes", split, 0, i).things for split in SCENES.splits for i in range(120)
        }

    def test_the_seed_moves_the_training_images_only(self) -> None:
        for split in ("val", "test"):
            assert (
                Scenes(split, seed=5)[17].images[0].tobytes()
                == Scenes(split)[17].images[0].tobytes()
            )
            assert Scenes(split, seed=5)[17].uid == Scenes(split)[17].uid
        assert (
            Scenes("train", seed=5)[17].images[0].tobytes()
            != Scenes("train")[17].images[0].tobytes()
        )

    def test_families_take_turns(self) -> None:
        data = Scenes("val", limit=20)
        assert [data[i].family for i in range(20)] == list(FAMILIES) * 4
        assert len(data) == 20

    def test_a_family_asks_the_same_whoever_sits_beside_it(self) -> None:
        alone = Scenes("test", families=["count"])
        assert [alone[i].question for i in range(8)] == [
            Scenes("test")[5 * i + 2].question for i in range(8)
        ]
        assert [alone[i].uid for i in range(8)] == [Scenes("test")[5 * i + 2].uid for i in range(8)]

    @pytest.mark.parametrize("index", [-1, 20, 10**6])
    def test_an_index_outside_raises(self, index: int) -> None:
        with pytest.raises(IndexError):
            Scenes("val", limit=20)[index]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"split": "tset"}, ["tset", "train", "val", "test"]),
            ({"families": ["count", "color"]}, ["color", *FAMILIES]),
            ({"families": []}, ["[]", *FAMILIES]),
            ({"families": ["count", "count"]}, ["count", "once"]),
            ({"limit": 0}, ["limit", "at least 1", "got 0"]),
            ({"limit": -4}, ["limit", "at least 1", "got -4"]),
        ],
    )
    def test_bad_input_is_one_sentence(
        self, arguments: dict[str, object], words: list[str]
    ) -> None:
        with pytest.raises(UserError) as caught:
            Scenes(**arguments)  # pyright: ignore[reportArgumentType]
        message = str(caught.value)
        assert all(word in message for word in words)
        assert message.endswith(".")
        assert len(message.splitlines()) == 1

    def test_a_limit_beyond_the_split_is_the_split(self) -> None:
        assert len(Scenes("val", limit=10**9)) == 2_000


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
        ("family", "one", "other"),
        [
            ("existence", "yes", "no"),
            ("relation", "left", "right"),
            ("relation", "above", "below"),
            ("attribute", "small", "large"),
        ],
    )
    def test_both_answers_are_as_likely(self, family: str, one: str, other: str) -> None:
        counts = Counter(question.answer for _, question in asked(family))
        share = counts[one] / (counts[one] + counts[other])
        assert share == pytest.approx(0.5, abs=0.06)
        assert counts[one] + counts[other] > 320

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
