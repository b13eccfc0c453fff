"""FastV, PyramidDrop and DART: schedules with the mean that was asked for, and choices against
plain loops."""

import math
from typing import Any

import pytest
import torch
from tests.lvlm.small import random_look
from tests.lvlm.test_families import SAMPLES
from torch import Tensor

from tprl.budget import budget, keep_top
from tprl.build import choices, load_component, target_of
from tprl.cost import LMShape
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner, LayerStage, Look, dropping
from tprl.pruners.dart import DARTPruner
from tprl.pruners.fastv import FastVPruner
from tprl.pruners.pyramiddrop import PyramidDropPruner
from tprl.splice import keep_all, splice

BUDGETS = [(144, 48), (144, 32), (144, 16), (576, 192), (576, 128), (576, 64)]
METHODS = (FastVPruner(), PyramidDropPruner(), DARTPruner())
every_method = pytest.mark.parametrize("pruner", METHODS, ids=[item.name for item in METHODS])


@every_method
@pytest.mark.parametrize("layers", [5, 28, 32])
@pytest.mark.parametrize("ratio", [1 / 2, 1 / 3, 0.3])
def test_the_mean_over_layers_is_the_keep_ratio(pruner: Any, layers: int, ratio: float) -> None:
    result = LayerPlan.of(pruner, ratio, layers).counts(576)
    assert len(result) == layers
    assert result[0] == 576
    assert sum(result) / layers / 576 == pytest.approx(ratio, abs=1 / 576)


@every_method
def test_keeping_everything_drops_nothing(pruner: Any) -> None:
    assert pruner.stages(1.0, 32) == ()
    assert isinstance(pruner, LayerPruner)


@pytest.mark.parametrize(
    ("pruner", "ratio", "layers", "bound"),
    [
        (FastVPruner(), 1 / 16, 32, "0.0625"),
        (FastVPruner(), 1 / 9, 5, "0.2"),
        (PyramidDropPruner(), 0.25, 32, "0.25"),
    ],
)
def test_an_infeasible_mean_is_refused(pruner: Any, ratio: float, layers: int, bound: str) -> None:
    with pytest.raises(UserError, match=rf"stays above {bound}: keep_ratio=.* is infeasible\."):
        pruner.stages(ratio, layers)


def test_published_schedules() -> None:
    assert FastVPruner(published=True).stages(0.5, 32) == (LayerStage(2, 1, 0.5),)
    assert PyramidDropPruner(published=True).stages(0.3, 32) == (
        LayerStage(8, 8, 0.5),
        LayerStage(16, 16, 0.25),
        LayerStage(24, 24, 0.125),
    )
    assert sum(LayerPlan.of(PyramidDropPruner(published=True), 0.3, 32).counts(576)) / 32 == 270
    # docs/baselines.md#fastv: 166
    assert FastVPruner().stages(192 / 576, 32)[0].keep * 576 == pytest.approx(166.4)


class Spy:
    """Keeps what a method saw and said."""

    extras: frozenset[str] = frozenset()

    def __init__(self, inner: Any) -> None:
        self.inner, self.name, self.seen = inner, inner.name, []

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        return self.inner.stages(keep_ratio, layers)

    def rank(self, look: Look, k: Tensor) -> Tensor:
        scores = self.inner.rank(look, k)
        self.seen.append((look, k, scores))
        return scores

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        return self.inner.flops(lm, stage, text, alive)


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32", max_new_tokens=2)


TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))


def looks(lvlm: FrozenLVLM, pruner: Any, ratio: float) -> Any:
    spy = Spy(pruner)
    encoded = lvlm.encode([SAMPLES[0], TWO, SAMPLES[4]])
    prompt = splice(encoded, keep_all(encoded))
    lvlm.score(prompt, ["yes it is", "no", "red"], LayerPlan.of(spy, ratio, lvlm.layers))
    return spy.seen


@pytest.mark.parametrize(
    "pruner", [FastVPruner(), PyramidDropPruner()], ids=["fastv", "pyramiddrop"]
)
def test_the_row_is_that_of_eager_attention(lvlm: FrozenLVLM, pruner: Any) -> None:
    """Against the attention weights that the stock model returns when it is told to."""
    eager = load_component("model", "llava", pretrained=None, dtype="float32", attention="eager")
    encoded = eager.encode([SAMPLES[0]])
    prompt = splice(encoded, keep_all(encoded))
    weights = eager.model(
        inputs_embeds=prompt.embeds,
        attention_mask=prompt.attention.long(),
        position_ids=prompt.positions[0],
        output_attentions=True,
    ).attentions
    spy = Spy(pruner)
    lvlm.answer(prompt, LayerPlan.of(spy, 0.7, lvlm.layers))
    layer = pruner.stages(0.7, lvlm.layers)[0].reads  # the first drop: nothing is gone yet
    assert torch.allclose(spy.seen[0][2][0], weights[layer][0, :, -1].mean(0), atol=1e-6)


def naive_last_row(look: Look, row: int) -> list[float]:
    """Attention of the last token, mean over heads; softmax by loops over heads and columns."""
    query, key = look.heads("q")[row].double().tolist(), look.heads("k")[row].double().tolist()
    total = [0.0] * len(key[0])
    for head, rows in enumerate(query):
        group = key[head * len(key) // len(query)]
        logits = [
            sum(a * b for a, b in zip(rows[-1], item, strict=True)) / len(item) ** 0.5
            for item in group
        ]
        weights = [
            math.exp(x) if real else 0.0
            for x, real in zip(logits, look.real[row].tolist(), strict=True)
        ]
        total = [
            old + weight / sum(weights) / len(query)
            for old, weight in zip(total, weights, strict=True)
        ]
    return total


@pytest.mark.parametrize(
    "pruner", [FastVPruner(), PyramidDropPruner()], ids=["fastv", "pyramiddrop"]
)
@pytest.mark.parametrize(("n", "k"), BUDGETS)
def test_what_lives_is_what_the_last_token_attends_to(pruner: Any, n: int, k: int) -> None:
    look = random_look(n)
    scores = pruner.rank(look, torch.full_like(look.image, k))
    keep = keep_top(scores, look.visual, torch.tensor([k, k]))
    for row in range(2):
        expected = naive_last_row(look, row)
        assert torch.allclose(scores[row], torch.tensor(expected), atol=1e-6)
        best = sorted(range(5, 5 + n), key=lambda c, e=expected: (-e[c], c))[:k]
        assert keep[row].nonzero().flatten().tolist() == sorted(best)


def naive_dart(look: Look, row: int, image: int, k: int, pivots: int, text_pivots: int) -> set[int]:
    """Columns that live, by loops."""
    keys = look.heads("k")[row]
    strength = [float(keys[:, column].abs().sum()) for column in range(keys.shape[1])]
    states = look.norm(look.hidden)[row]

    def alike(item: int, other: int) -> float:
        return float(
            torch.dot(states[item], states[other]) / states[item].norm() / states[other].norm()
        )

    group = [
        c for c in range(len(strength)) if look.visual[row, c] and int(look.image[row, c]) == image
    ]
    last = max(c for c in range(len(strength)) if look.visual[row, c])
    words = [
        c for c in range(last + 1, len(strength)) if look.real[row, c] and not look.answer[row, c]
    ]
    pivots_of_image = sorted(group, key=lambda c: -strength[c])[:pivots]
    pivots_of_text = sorted(words, key=lambda c: -strength[c])[:text_pivots]
    if k <= len(pivots_of_image):
        return set(pivots_of_image[:k])
    kept, turns = list(pivots_of_image), pivots_of_image + pivots_of_text
    for turn, pivot in enumerate(turns):
        count = (k - len(pivots_of_image)) // len(turns) + (
            turn < (k - len(pivots_of_image)) % len(turns)
        )
        pool = [c for c in group if c not in kept]
        kept += sorted(pool, key=lambda c: alike(pivot, c))[:count]
    return set(kept)


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.55])
@pytest.mark.parametrize(("pivots", "text_pivots"), [(4, 4), (3, 5), (8, 1)])
def test_dart_keeps_what_loops_keep(
    lvlm: FrozenLVLM, ratio: float, pivots: int, text_pivots: int
) -> None:
    ((look, k, scores),) = looks(lvlm, DARTPruner(pivots, text_pivots), ratio)
    for row in range(3):
        for image in range(int(look.image[row].max()) + 1):
            columns = [
                c
                for c in range(look.image.shape[1])
                if look.visual[row, c] and int(look.image[row, c]) == image
            ]
            count = int(k[row, columns[0]])
            assert count == budget(DARTPruner().stages(ratio, lvlm.layers)[0].keep, len(columns))
            best = set(sorted(columns, key=lambda c: -float(scores[row, c]))[:count])
            assert best == naive_dart(look, row, image, count, pivots, text_pivots)


@pytest.mark.parametrize(("n", "k"), [*BUDGETS, (144, 1), (144, 3), (144, 4), (144, 5)])
def test_dart_on_random_states_and_with_fewer_tokens_than_pivots(n: int, k: int) -> None:
    look = random_look(n)
    scores = DARTPruner().rank(look, torch.full_like(look.image, k))
    keep = keep_top(scores, look.visual, torch.tensor([k, k]))
    for row in range(2):
        assert set(keep[row].nonzero().flatten().tolist()) == naive_dart(look, row, 0, k, 4, 4)


def test_nothing_reads_the_answer_that_is_scored(lvlm: FrozenLVLM) -> None:
    encoded = lvlm.encode([SAMPLES[0]])
    prompt = splice(encoded, keep_all(encoded))
    for pruner in METHODS:
        result = []
        for answer in ("yes it is", "no no no"):
            spy = Spy(pruner)
            lvlm.score(prompt, [answer], LayerPlan.of(spy, 0.7, lvlm.layers))
            width = prompt.embeds.shape[1]
            result.append(spy.seen[0][2][0, :width] * prompt.visual[0])
        assert torch.allclose(*result, atol=1e-6)


def test_every_layer_pruner_has_its_yaml() -> None:
    names = {target_of("pruner", name).__name__ for name in choices("pruner")}
    assert {type(item).__name__ for item in METHODS} <= names


def test_counted_flops_are_those_of_the_keys_and_one_row() -> None:
    lm = LMShape(32, 4096, 11008, 32, 32, 128, 32000)
    stage = FastVPruner().stages(1 / 3, 32)[0]
    tokens = 64 + 576
    assert (
        FastVPruner().flops(lm, stage, 64, 576)
        == 2 * tokens * 4096**2 + 2 * 4096**2 + 2 * tokens * 4096
    )
    assert DARTPruner().flops(lm, stage, 64, 576) == 2 * tokens * 4096**2 + 2 * 8 * 576 * 4096
    assert math.isclose(
        LayerPlan.of(FastVPruner(), 1 / 3, 32).flops(lm, 64, 576),
        FastVPruner().flops(lm, stage, 64, 576),
    )


def test_without_a_plan_nothing_is_hooked(lvlm: FrozenLVLM) -> None:
    encoded = lvlm.encode([SAMPLES[0]])
    with dropping(lvlm.model, splice(encoded, keep_all(encoded)), None):
        assert not any(layer._forward_pre_hooks for layer in lvlm.model.model.language_model.layers)
