"""Where the embedded LVLM is told to look, on a sample small enough to count by hand.

Patches 0, 1 are a large red circle, 2 is a small blue square, 3 is background, 4 a small red
square; 1 is dropped.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tprl.data import scenes
from tprl.pretraining.looking import SINK, Looking
from tprl.pretraining.packing import IGNORE, Pack
from tprl.pretraining.tiny_llava import build_tokenizer

KEPT = torch.tensor([[0, 2, 3, 4]])
FREE = torch.zeros(1, 4, 2, 5)


@pytest.fixture(scope="module")
def look() -> Looking:
    return Looking(build_tokenizer())


def pack(
    words: tuple[str, str], target: str | None = None, family: str = "attribute", region: Any = ()
) -> Pack:
    """One segment of two columns; the second predicts `target`."""
    ids = build_tokenizer().get_vocab()
    fields: dict[str, Any] = dict.fromkeys(Pack._fields)
    names, values = list(scenes.COLORS), {"large": 2, "small": 1}
    red, blue = names.index("red") + 1, names.index("blue") + 1
    circle, square = scenes.SHAPES.index("circle") + 1, scenes.SHAPES.index("square") + 1
    assert [*scenes.SIZES] == ["small", "large"]
    fields |= {
        "owner": torch.tensor([[1, 1, 2, 0, 3]]),
        "color": torch.tensor([[red, red, blue, 0, red]]),
        "shape": torch.tensor([[circle, circle, square, 0, square]]),
        "size": torch.tensor([[values["large"]] * 2 + [values["small"], 0, values["small"]]]),
        "text": torch.tensor([[ids[word] for word in words]]),
        "segment": torch.tensor([[1, 1]]),
        "target": torch.tensor([[IGNORE, IGNORE if target is None else ids[target]]]),
        "family": torch.full((1, 2), scenes.FAMILIES.index(family)),
        "region": torch.zeros(1, 2, 5, dtype=torch.bool),
    }
    fields["region"][0, 1, list(region)] = True
    return Pack(**fields)


def lower(rows: list[list[float]]) -> Tensor:
    """The first half of four heads attends so; the other half, which is free, evenly."""
    return torch.tensor([[rows, rows, [[0.25] * 4] * 4, [[0.25] * 4] * 4]])


# every object token at its object's first
HOME = lower([[1, 0, 0, 0], [0, 1, 0, 0], [0.25] * 4, [0, 0, 0, 1]])


def upper(column: int, row: list[float]) -> Tensor:
    out = FREE.clone()
    out[0, :2, column] = torch.tensor(row)
    out[0, 2:] = 0.2
    return out


def nothing() -> float:
    return -math.log(1.001)  # mass 1 plus the small constant in the logarithm


class TestLower:
    def test_a_token_looks_at_the_first_of_its_object_that_was_kept(self, look: Looking) -> None:
        rows = lower([[0.5, 0, 0, 0], [0.3, 0.7, 0, 0], [0.9, 0, 0, 0], [0, 0, 0, 1]])
        loss, mass = look(rows, FREE, KEPT, pack(("is", "the")))
        assert float(mass) == pytest.approx((0.5 + 0.7 + 1) / 3)
        assert float(loss) == pytest.approx(
            -(math.log(0.501) + math.log(0.701) + math.log(1.001)) / 3
        )

    def test_later_tokens_of_an_object_look_back(self, look: Looking) -> None:
        rows = torch.zeros(1, 2, 2, 2)
        rows[0, 0] = torch.tensor([[1.0, 0.0], [0.6, 0.4]])
        _, mass = look(rows, torch.zeros(1, 2, 2, 3), torch.tensor([[0, 1]]), pack(("is", "the")))
        assert float(mass) == pytest.approx((1 + 0.6) / 2)


class TestUpper:
    @pytest.mark.parametrize(
        ("word", "expected"),
        [("red", 0.1 + 0.4), ("blue", 0.2), ("square", 0.2 + 0.4), ("large", 0.1)],
    )
    def test_a_word_looks_at_the_tokens_that_have_its_property(
        self, look: Looking, word: str, expected: float
    ) -> None:
        loss, _ = look(HOME, upper(0, [0.05, 0.1, 0.2, 0.25, 0.4]), KEPT, pack((word, "the")))
        assert float(loss) == pytest.approx(nothing() - math.log(expected + 1e-3))

    def test_an_answer_looks_at_the_objects_that_decide_it(self, look: Looking) -> None:
        loss, mass = look(
            HOME,
            upper(1, [0.05, 0.1, 0.2, 0.25, 0.4]),
            KEPT,
            pack(("is", "the"), "small", region=[1, 2, 4]),
        )
        assert float(loss) == pytest.approx(nothing() - math.log(0.6 + 1e-3))
        assert float(mass) == pytest.approx((3 + 0.6) / 4)

    @pytest.mark.parametrize("target", ["</s>", None])
    def test_the_end_of_an_answer_is_free(self, look: Looking, target: str | None) -> None:
        loss, _ = look(HOME, upper(1, [0.2] * 5), KEPT, pack(("is", "the"), target, region=[2]))
        assert float(loss) == pytest.approx(nothing(), abs=1e-6)

    def test_a_region_that_was_dropped_asks_for_nothing(self, look: Looking) -> None:
        attention = upper(1, [0.2] * 5).requires_grad_()
        loss, _ = look(HOME, attention, KEPT, pack(("is", "the"), "small", region=[1]))
        assert float(loss.detach()) == pytest.approx(nothing(), abs=1e-6)
        loss.backward()
        assert attention.grad is not None
        assert not attention.grad.any()


class TestCounting:
    def aim(self, objects: list[int]) -> list[float]:
        row = [SINK, *(float(i in objects) for i in range(4))]
        return [value / sum(row) for value in row]

    def test_one_token_per_object_and_the_start(self, look: Looking) -> None:
        """Two red things, of which three patches were drawn and two are first: kept columns 0 and
        3."""
        asked = pack(("is", "the"), "2", "count", [0, 1, 4])
        loss, _ = look(HOME, upper(1, self.aim([0, 3])), KEPT, asked)
        assert float(loss) == pytest.approx(nothing(), abs=1e-5)
        worse, _ = look(HOME, upper(1, self.aim([0])), KEPT, asked)
        assert float(worse) > 0.1

    def test_an_answer_of_zero_needs_a_look_at_every_object(self, look: Looking) -> None:
        """Every object had to be looked at, and none counts."""
        asked = pack(("is", "the"), "0", "count", [0, 1, 2, 4])
        loss, _ = look(HOME, upper(1, [1.0, 0.0, 0.0, 0.0, 0.0]), KEPT, asked)
        assert float(loss) == pytest.approx(nothing(), abs=1e-5)
        worse, _ = look(HOME, upper(1, self.aim([0])), KEPT, asked)
        assert float(worse) > 0.1


class TestConjunction:
    def test_a_word_looks_at_what_the_name_up_to_it_describes(self) -> None:
        """Patches 0 and 1 are the red circle, 4 is red and small: "red circle" leaves 0 and 1,
        "small red" 4."""
        plain, joined = (Looking(build_tokenizer(), conjunction=value) for value in (False, True))
        assert plain.named(pack(("red", "circle")))[0, 1].tolist() == [
            True,
            True,
            False,
            False,
            False,
        ]
        assert plain.named(pack(("small", "red")))[0, 1].tolist() == [
            True,
            True,
            False,
            False,
            True,
        ]
        assert joined.named(pack(("small", "red")))[0].tolist() == [
            [False, False, True, False, True],
            [False, False, False, False, True],
        ]
        assert joined.named(pack(("the", "red")))[0, 1].tolist() == [True, True, False, False, True]

    def test_names_of_two_questions_do_not_mix(self) -> None:
        joined = Looking(build_tokenizer(), conjunction=True)
        apart = pack(("small", "red"))._replace(segment=torch.tensor([[1, 2]]))
        assert joined.named(apart)[0, 1].tolist() == [True, True, False, False, True]
