"""SparseVLM: schedules with the mean that was asked for; raters, scores, survivors, centroids
against plain loops."""

import math
from collections.abc import Sequence
from itertools import pairwise
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
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner, LayerStage, Look, Rewriter
from tprl.pruners.recycling import density_peaks
from tprl.pruners.sparsevlm import SparseVLMPruner
from tprl.splice import keep_all, splice

PLUS, FIRST = SparseVLMPruner(), SparseVLMPruner(plus=False)
both = pytest.mark.parametrize("pruner", [PLUS, FIRST], ids=["plus", "v1.5"])

TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
MIXED = [SAMPLES[0], TWO, SAMPLES[3]._replace(images=()), SAMPLES[4]]
ANSWERS = ["yes it is", "no", "two of them", "red"]
# 36 tokens an image; v1.5 makes two clusters, one or none.
SCHEDULES = {
    "reads the layer": (LayerStage(0, 0, 0.6), LayerStage(1, 1, 0.17)),
    "reads the layer before": (LayerStage(1, 0, 0.17),),
    "keeps one": (LayerStage(0, 0, 0.9), LayerStage(1, 1, 0.01)),
}
schedules = pytest.mark.parametrize("stages", SCHEDULES.values(), ids=list(SCHEDULES))


@both
@pytest.mark.parametrize("layers", [5, 28, 32])
@pytest.mark.parametrize("ratio", [0.97, 0.6, 1 / 2, 1 / 3, 0.3, 2 / 9, 0.21])
def test_the_mean_over_layers_is_the_keep_ratio(pruner: Any, layers: int, ratio: float) -> None:
    plan = LayerPlan.of(pruner, ratio, layers)
    result = plan.counts(576)
    assert result[0] == 576
    assert result == sorted(result, reverse=True)
    assert sum(result) / layers / 576 == pytest.approx(ratio, abs=1 / 576)
    assert [stage.before for stage in plan.stages] == {
        5: [1, 2, 3],
        28: [3, 6, 14],
        32: [3, 7, 16],
    }[layers]
    assert all(stage.reads == stage.before - 1 for stage in plan.stages)


@both
def test_any_depth_has_a_schedule_that_grows_with_the_ratio(pruner: Any) -> None:
    for layers in (*range(2, 8), 12, 24, 28, 32, 40, 80):
        least = pruner.stages(0.99, layers)[0].before / layers
        ratios = [least + (1 - least) * step / 20 for step in range(1, 20)]
        means = []
        for ratio in ratios:
            stages = pruner.stages(ratio, layers)
            edges = [*(stage.before for stage in stages), layers]
            assert edges == sorted(set(edges))
            spans = [stop - start for start, stop in pairwise(edges)]
            kept = [stage.keep for stage in stages]
            assert 1 >= kept[0] >= kept[-1] > 0
            means.append((edges[0] + sum(a * b for a, b in zip(spans, kept, strict=True))) / layers)
        assert means == pytest.approx(ratios, abs=1e-6)


@both
def test_keeping_everything_drops_nothing(pruner: Any) -> None:
    assert pruner.stages(1.0, 32) == ()
    assert isinstance(pruner, LayerPruner)
    assert isinstance(pruner, Rewriter)


@both
@pytest.mark.parametrize(
    ("ratio", "layers", "bound"), [(1 / 12, 32, "0.0938"), (0.2, 5, "0.2"), (0.9, 1, "1")]
)
def test_an_infeasible_mean_is_refused(pruner: Any, ratio: float, layers: int, bound: str) -> None:
    with pytest.raises(UserError, match=rf"stays above {bound}: keep_ratio=.* is infeasible\."):
        pruner.stages(ratio, layers)


@pytest.mark.parametrize(
    ("plus", "label", "chosen", "mean"),
    [
        (True, 192, [300, 200, 118], 206.8),
        (True, 128, [238, 108, 60], 144.1),
        (True, 96, [246, 54, 28], 113.9),
        (True, 64, [66, 34, 20], 81.8),
        (False, 192, [300, 200, 110], 206.5),
        (False, 128, [303, 110, 36], 145.4),
        (False, 64, [66, 30, 17], 82.2),
    ],
)
def test_published_lists_and_their_true_means(
    plus: bool, label: int, chosen: list[int], mean: float
) -> None:
    """docs/baselines.md#sparsevlm; the means of v1 are those with the recycled tokens."""
    pruner = SparseVLMPruner(plus, published=True)
    for ratio in (label / 576, (label + 10) / 576):
        counts = LayerPlan.of(pruner, ratio, 32).counts(576)
        assert sum(counts) / 32 == pytest.approx(mean, abs=0.06)
        result, alive = [], 576
        for count in (counts[3], counts[7], counts[16]):
            recycled = 0 if plus else naive_clusters(alive, count)
            result.append(count - recycled)
            alive = count
        assert result == chosen
    # Asked for that mean, the solver comes back to the list.
    again = LayerPlan.of(SparseVLMPruner(plus), sum(counts) / 32 / 576, 32).counts(576)
    assert again == counts


def naive_clusters(n: int, count: int) -> int:
    """The least c with c clusters made of what is pruned when count - c are chosen; less than
    `count`."""
    if count >= n:
        return 0
    fits = [c for c in range(1, n) if (3 * (n - count + c) // 10 + 1) // 10 + 1 == c]
    return min(fits[0], count - 1)


class Spy:
    """Keeps what a method saw and said."""

    extras: frozenset[str] = frozenset()

    def __init__(self, inner: SparseVLMPruner) -> None:
        self.inner, self.name, self.seen = inner, inner.name, []

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        return self.inner.stages(keep_ratio, layers)

    def rank(self, look: Look, k: Tensor) -> Tensor:
        return self.inner.rank(look, k)

    def rewrite(self, look: Look, read: Look, k: Tensor) -> tuple[Look, Tensor]:
        after, scores = self.inner.rewrite(look, read, k)
        self.seen.append((look, read, k, after, scores))
        return after, scores

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        return self.inner.flops(lm, stage, text, alive)


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32", max_new_tokens=3)


def seen(lvlm: FrozenLVLM, pruner: SparseVLMPruner, stages: Sequence[LayerStage]) -> Any:
    spy = Spy(pruner)
    encoded = lvlm.encode(MIXED)
    prompt = splice(encoded, keep_all(encoded))
    lvlm.score(prompt, ANSWERS, LayerPlan(spy, tuple(stages), lvlm.layers))
    assert len(spy.seen) == len(stages)
    return spy.seen


def naive_raters(look: Look, row: int) -> list[int]:
    """Columns of the words that rate, when all visual tokens are there; by loops."""
    visual = [c for c in range(look.real.shape[1]) if look.visual[row, c]]
    words = [
        c
        for c in range(visual[-1] + 1, look.real.shape[1])
        if bool(look.real[row, c]) and not bool(look.answer[row, c])
    ]
    share = dict.fromkeys(words, 0.0)
    for v in visual:
        logits = {
            t: float(torch.dot(look.first[row, v].double(), look.first[row, t].double()))
            for t in words
        }
        total = sum(math.exp(value - max(logits.values())) for value in logits.values())
        for t in words:
            share[t] += math.exp(logits[t] - max(logits.values())) / total / len(visual)
    return [t for t in words if share[t] > sum(share.values()) / len(words)]


def naive_scores(look: Look, row: int, raters: list[int], plus: bool) -> dict[int, float]:
    """Scores of the visual columns; softmax attention by loops over heads and raters."""
    query, key = look.heads("q")[row], look.heads("k")[row]
    heads, groups = query.shape[0], query.shape[0] // key.shape[0]
    visual = [c for c in range(look.real.shape[1]) if look.visual[row, c]]
    tables = []
    for head in range(heads):
        table = dict.fromkeys(visual, 0.0)
        for rater in raters:
            past = [c for c in range(rater + 1) if look.real[row, c]]
            logits = (
                torch.stack([query[head, rater] @ key[head // groups, c] for c in past])
                / query.shape[-1] ** 0.5
            )
            weights = dict(zip(past, logits.double().softmax(0).tolist(), strict=True))
            for v in visual:
                table[v] += weights[v] / len(raters)
        tables.append(table)
    if plus:
        tables = sorted(tables, key=lambda table: -sum(table.values()))[
            : max(1, round(14 * heads / 32))
        ]
    return {v: sum(table[v] for table in tables) / len(tables) for v in visual}


def naive_density_peaks(x: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Centers, in order, and the centroid of each."""
    n, width = x.shape
    distance = [[float((x[i] - x[j]).norm()) / width**0.5 for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(sorted(d * d for d in distance[i])[:count]) / count) for i in range(n)]
    widest, value = max(max(row) for row in distance), []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        value.append(density[i] * min((distance[i][j] for j in denser), default=widest))
    centers = sorted(sorted(range(n), key=lambda i: -value[i])[:count])
    groups: dict[int, list[int]] = {center: [center] for center in centers}
    for i in range(n):
        if i not in centers:
            groups[min(centers, key=lambda c: distance[i][c])].append(i)
    return centers, torch.stack([x[groups[center]].mean(0) for center in centers])


def naive_survivors(
    hidden: Tensor, scores: dict[int, float], members: list[int], count: int, plus: bool
) -> tuple[list[int], list[int], Tensor]:
    """Of one image: the columns that live, and those of them that are centroids, with their
    states."""
    order = sorted(members, key=lambda c: -scores[c])
    recycled = 0 if plus else naive_clusters(len(members), count)
    keep = order[: count - recycled]
    if not recycled:
        return keep, [], hidden[:0]
    pool = sorted(order[len(keep) : len(keep) + 3 * (len(members) - len(keep)) // 10 + 1])
    centers, centroids = naive_density_peaks(hidden[pool], recycled)
    columns = [pool[center] for center in centers]
    return keep + columns, columns, centroids


LARGE = [pytest.param(576, k, marks=pytest.mark.slow) for k in (128, 192)]


@both
@pytest.mark.parametrize(("n", "k"), [(144, 48), (144, 32), (144, 16), (576, 64), *LARGE])
def test_random_states(pruner: SparseVLMPruner, n: int, k: int) -> None:
    look = random_look(n)
    after, best = pruner.rewrite(look, look, torch.full_like(look.image, k))
    keep = keep_top(best, look.visual, torch.tensor([k, k]))
    for row in range(2):
        raters = naive_raters(look, row)
        assert after.marked[row].nonzero().flatten().tolist() == raters
        scores = naive_scores(look, row, raters, pruner.plus)
        kept, columns, centroids = naive_survivors(
            look.hidden[row], scores, list(scores), k, pruner.plus
        )
        assert keep[row].nonzero().flatten().tolist() == sorted(kept)
        expected = look.hidden[row].clone()
        expected[columns] = centroids
        assert torch.allclose(after.hidden[row], expected, atol=1e-5)


@both
@schedules
def test_raters_scores_and_what_lives_are_those_of_loops(
    lvlm: FrozenLVLM, pruner: SparseVLMPruner, stages: tuple[LayerStage, ...]
) -> None:
    result = seen(lvlm, pruner, stages)
    tensors = []
    rows = (
        result[0][1].visual.any(1).nonzero().flatten().tolist()
    )  # scoring sorts prompts by length
    assert len(rows) == 3
    for row in rows:
        raters = naive_raters(result[0][1], row)
        words = int(result[0][1].after[row].sum())
        assert 0 < len(raters) < words
        for stage, (look, read, k, after, best) in zip(stages, result, strict=True):
            # text stands behind the images: it moves together
            gone = result[0][1].real.shape[1] - read.real.shape[1]
            places = [c - gone for c in raters]
            assert after.marked[row].nonzero().flatten().tolist() == places
            expected = naive_scores(read, row, places, pruner.plus)
            scores = pruner.rank(read._replace(marked=after.marked), k)[row]
            assert torch.allclose(
                scores[list(expected)], torch.tensor(list(expected.values())), atol=1e-6
            )
            hidden = look.hidden[row].clone()
            for image in range(int(look.image[row].max()) + 1):
                members = [c for c in expected if int(look.image[row, c]) == image]
                count = int(k[row, members[0]])
                assert count == budget(stage.keep, 36)
                keep, columns, centroids = naive_survivors(
                    look.hidden[row], expected, members, count, pruner.plus
                )
                hidden[columns] = centroids
                tensors.append(len(columns))
                assert set(sorted(members, key=lambda c: -float(best[row, c]))[:count]) == set(keep)
            assert torch.allclose(after.hidden[row], hidden, atol=1e-5)
    if not pruner.plus:
        assert set(tensors) == {0.6: {1}, 0.17: {2}, 0.9: {0, 1}}[stages[0].keep]


def test_density_peaks_are_those_of_loops() -> None:
    torch.manual_seed(0)
    sizes, counts = [17, 30, 1, 9, 0], [3, 5, 1, 2, 0]
    x = torch.randn(5, 30, 6) * 1.5
    real = torch.arange(30) < torch.tensor(sizes).unsqueeze(1)
    center, centroid = density_peaks(x, real, torch.tensor(counts))
    for row, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        assert int(center[row].sum()) == count
        if count:
            centers, expected = naive_density_peaks(x[row, :size], count)
            assert center[row].nonzero().flatten().tolist() == centers
            assert torch.allclose(centroid[row, centers], expected, atol=1e-6)


def test_points_that_are_all_the_same_are_clustered_too() -> None:
    center, centroid = density_peaks(
        torch.ones(1, 12, 4), torch.ones(1, 12, dtype=torch.bool), torch.tensor([2])
    )
    assert center[0].nonzero().flatten().tolist() == [0, 1]  # ties go to the lower index
    assert torch.equal(centroid[0, :2], torch.ones(2, 4))


@both
@schedules
def test_a_ragged_batch_is_its_samples_alone(
    lvlm: FrozenLVLM, pruner: SparseVLMPruner, stages: tuple[LayerStage, ...]
) -> None:
    plan = LayerPlan(pruner, stages, lvlm.layers)
    encoded = lvlm.encode(MIXED)
    prompt = splice(encoded, keep_all(encoded))
    texts, log_prob = lvlm.answer(prompt, plan), lvlm.score(prompt, ANSWERS, plan)[0]
    assert not torch.allclose(log_prob, lvlm.score(prompt, ANSWERS)[0], atol=1e-4)
    for row, sample in enumerate(MIXED):
        item = lvlm.encode([sample])
        alone = splice(item, keep_all(item))
        assert lvlm.answer(alone, plan) == texts[row : row + 1]
        assert torch.allclose(
            lvlm.score(alone, ANSWERS[row : row + 1], plan)[0], log_prob[row : row + 1], atol=1e-5
        )


@both
def test_nothing_reads_the_answer_that_is_scored(lvlm: FrozenLVLM, pruner: SparseVLMPruner) -> None:
    encoded = lvlm.encode([SAMPLES[0]])
    prompt = splice(encoded, keep_all(encoded))
    width, result = prompt.embeds.shape[1], []
    for answer in ("yes it is", "no no no"):
        spy = Spy(pruner)
        lvlm.score(prompt, [answer], LayerPlan(spy, SCHEDULES["reads the layer"], lvlm.layers))
        (_, _, _, item, scores), (_, _, _, other, final) = spy.seen
        assert not item.marked[:, width:].any()
        result.append(
            (scores[0, :width] * prompt.visual[0], final[other.visual], other.hidden[other.visual])
        )
    for first, second in zip(*result, strict=True):
        assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("words", [0, 1, 2])
def test_prompts_in_which_no_word_stands_out(lvlm: FrozenLVLM, words: int) -> None:
    """No word after the image: the last token rates; one word, or two alike: all of them do."""
    read = seen(lvlm, PLUS, SCHEDULES["reads the layer"])[0][1]
    row = int(read.visual.any(1).nonzero()[0])
    read = Look(*read[:2], *(part[row : row + 1] for part in read[2:]))
    last = int(read.visual[0].nonzero().max())
    at = torch.arange(last + 1 + words).unsqueeze(0)
    look = read.take(at, read.real.gather(1, at))
    look.first[:, last + 1 :] = look.first[:, :1]
    k = torch.full_like(look.image, 5)
    after, scores = PLUS.rewrite(look, look, k)
    expected = list(range(last + 1, last + 1 + words)) or [last]
    assert after.marked[0].nonzero().flatten().tolist() == expected
    assert torch.isfinite(scores).all()


def test_counted_flops_are_those_of_keys_raters_and_their_rows() -> None:
    lm = LMShape(32, 4096, 11008, 32, 32, 128, 32000)
    first, second, _ = PLUS.stages(1 / 3, 32)
    tokens = 64 + 576
    rows = 2 * tokens * 4096**2 + 2 * 64 * 4096**2 + 2 * 64 * tokens * 4096
    assert PLUS.flops(lm, second, 64, 576) == rows
    assert PLUS.flops(lm, first, 64, 576) == rows + 2 * 64 * 576 * 4096
    assert FIRST.flops(lm, second, 64, 576) == rows + 2 * 173**2 * 4096


def test_it_has_its_yaml() -> None:
    assert "sparsevlm" in choices("pruner")
    assert target_of("pruner", "sparsevlm") is SparseVLMPruner
