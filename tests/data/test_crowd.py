"""The crowded world: right and unambiguous, far more objects than a small budget of tokens."""

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from tprl.data.crowd import CROWD, SIDE, SIZES, Crowd, draw_crowd, full_name, neighbors
from tprl.data.draws import Stream
from tprl.data.scenes import COLORS, SHAPES, Question, Scene, Scenes, Thing, pixels_inside


@cache
def drawn(count: int) -> tuple[Scene, ...]:
    return tuple(draw_crowd("tests", i) for i in range(count))


@cache
def asked(family: str) -> tuple[tuple[Scene, Question], ...]:
    ask = CROWD.ask[family]
    return tuple(
        (scene, ask(scene.things, Stream("asked", i))) for i, scene in enumerate(drawn(200))
    )


def bare(text: str) -> list[set[str]]:
    """The properties in each name of a question; names are separated by words that are no
    property."""
    known = {*COLORS, *SHAPES, *SIZES}
    names: list[set[str]] = [set()]
    for word in re.findall(r"\w+", text):
        if word in known:
            names[-1].add(word)
        elif names[-1]:
            names.append(set())
    return [name for name in names if name]


def naive_answer(things: tuple[Thing, ...], question: Question) -> str:
    """The answer by rules written apart from those that asked."""
    groups = [
        [t for t in things if name <= {t.color, t.shape, t.size}] for name in bare(question.text)
    ]
    match question.family:
        case "attribute":
            return groups[0][0].size
        case "existence":
            return "yes" if groups[0] else "no"
        case "count":
            return str(len(groups[0]))
        case "relation":
            a, b = groups[0][0], groups[1][0]
            if "above" in question.text:
                return "above" if a.y < b.y else "below"
            return "left" if a.x < b.x else "right"
        case "neighbor":
            thing = groups[0][0]
            others = [t for t in things if t is not thing]
            distances = [np.hypot(t.x - thing.x, t.y - thing.y) for t in others]
            return getattr(others[int(np.argmin(distances))], question.text.split()[1])
        case _:
            return " ".join(str(int(v)) for v in groups[0][0].box)


class TestScene:
    def test_objects_are_many_apart_inside_and_all_different(self) -> None:
        for scene in drawn(50):
            assert 24 <= len(scene.things) <= 40
            assert len({full_name(thing) for thing in scene.things}) == len(scene.things)
            cover = sum(pixels_inside(thing, SIDE).astype(int) for thing in scene.things)
            assert cover.max() == 1
            for thing in scene.things:
                assert 0 <= min(thing.box) <= max(thing.box) <= SIDE

    def test_every_look_is_drawn(self) -> None:
        looks = Counter(full_name(thing) for scene in drawn(200) for thing in scene.things)
        assert len(looks) == 48
        assert max(looks.values()) < 1.5 * min(looks.values())


class TestQuestions:
    @pytest.mark.parametrize("family", CROWD.families)
    def test_answers_are_right_and_decided_by_their_region(self, family: str) -> None:
        for scene, question in asked(family):
            assert question.family == family
            assert question.answer == naive_answer(scene.things, question), question
            assert set(question.region) <= {thing.box for thing in scene.things}
            assert len(set(question.region)) == len(question.region) > 0

    def test_every_name_refers_to_one_object(self) -> None:
        for family in ("attribute", "relation", "neighbor", "grounding"):
            for scene, question in asked(family):
                for name in bare(question.text):
                    assert sum(name <= {t.color, t.shape, t.size} for t in scene.things) == 1

    def test_no_answer_dominates(self) -> None:
        for family, most in (
            ("attribute", 0.6),
            ("existence", 0.6),
            ("relation", 0.35),
            ("count", 0.4),
        ):
            answers = Counter(question.answer for _, question in asked(family))
            assert max(answers.values()) < most * answers.total(), family

    def test_almost_all_neighbors_are_clearly_the_nearest(self) -> None:
        clear = 0
        for scene, question in asked("neighbor"):
            named = [thing.box for thing in scene.things].index(question.region[0])
            other, sure = neighbors(scene.things)[named]
            assert other.box == question.region[1]
            clear += sure
        assert clear > 0.95 * len(asked("neighbor"))

    def test_one_object_alone_has_no_neighbor(self) -> None:
        (thing,) = things = (Thing("red", "circle", "small", 9, 9, 4),)
        assert neighbors(things) == [(thing, False)]


class TestDataset:
    def test_it_is_like_scenes_but_for_its_world(self) -> None:
        data = Crowd("val")
        assert len(data) == 2_400
        assert [data[i].family for i in range(6)] == list(CROWD.families)
        assert data[7].uid == "crowd/val/1/existence"
        assert data[0].images[0].size == (SIDE, SIDE)
        assert data[0].images[0].tobytes() == Crowd("val")[0].images[0].tobytes()
        assert data[0].images[0].tobytes() != Crowd("test")[0].images[0].tobytes()
        assert Scenes("val")[0].images[0].size == (96, 96)
