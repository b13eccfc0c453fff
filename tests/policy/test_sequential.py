import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from tests.policy.inputs import subsets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tprl import cost
from tprl.policy import dpp, sequential
from tprl.policy.dpp import JITTER


def world(
    images: int = 2, tokens: int = 7, width: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, unit features, alive) of random images; the last image has fewer tokens."""
    draw = torch.Generator().manual_seed(seed)
    alive = torch.ones(images, tokens, dtype=torch.bool)
    alive[-1, tokens - 2 :] = images == 1
    features = dpp.unit_features(torch.randn(images, tokens, width, generator=draw), alive)
    return 2 * torch.randn(images, tokens, generator=draw), features, alive


def naive_gains(scores: Tensor, features: Tensor, chosen: list[int]) -> Tensor:
    """det(L_{Y + i}) / det(L_Y) of every token i outside of Y, by determinants; 0 inside."""
    q = (0.5 * scores.double()).exp()
    f = features.double()
    kernel = q[:, None] * (f @ f.T + JITTER * torch.eye(len(q), dtype=torch.float64)) * q
    whole = torch.linalg.det(kernel[chosen][:, chosen]) if chosen else torch.tensor(1.0)
    gains = torch.zeros_like(q)
    for i in set(range(len(q))) - set(chosen):
        grown = [*chosen, i]
        gains[i] = torch.linalg.det(kernel[grown][:, grown]) / whole
    return gains


def places(sequence: tuple[int, ...], tokens: int) -> list[int]:
    return [sequence.index(i) + 1 if i in sequence else 0 for i in range(tokens)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_prob_is_a_softmax_over_ratios_of_determinants(temperature: float) -> None:
    scores, features, alive = world(images=1)
    sequence = (4, 0, 6)
    order = torch.tensor([[places(sequence, 7)]])
    got = sequential.log_prob(scores, features, alive, torch.tensor([3]), temperature, order)[0, 0]
    for step, item in enumerate(sequence):
        gains = naive_gains(scores[0], features[0], list(sequence[:step])) ** (1 / temperature)
        assert float(got[item]) == pytest.approx(float((gains[item] / gains.sum()).log()), abs=1e-5)
    assert not bool(got[order[0, 0] == 0].any())


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    scores, features, alive = world(images=1, tokens=5)
    orders = torch.tensor([[places(p, 5) for p in itertools.permutations(range(5), 3)]])
    log_prob = sequential.log_prob(scores, features, alive, torch.tensor([3]), 0.7, orders).sum(-1)
    assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_draws_follow_the_log_probabilities() -> None:
    scores, features, alive = world(images=1, tokens=5)
    k, draws = torch.tensor([2]), 40_000
    noise = torch.rand(1, draws, 5, generator=torch.Generator().manual_seed(1))
    order = sequential.draw(scores, features, alive, k, 1.0, noise)
    counted = Counter(map(tuple, order[0].tolist()))
    wanted = [places(p, 5) for p in itertools.permutations(range(5), 2)]
    expected = (
        sequential.log_prob(scores, features, alive, k, 1.0, torch.tensor([wanted]))
        .sum(-1)
        .exp()[0]
    )
    assert sum(counted.values()) == draws == sum(counted[tuple(row)] for row in wanted)
    statistic = sum(
        (counted[tuple(row)] - draws * p) ** 2 / (draws * p)
        for row, p in zip(wanted, expected.tolist(), strict=True)
    )
    degrees = len(wanted) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_is_that_of_finite_differences(temperature: float) -> None:
    scores, features, alive = world()
    k = torch.tensor([3, 2])
    noise = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(2))
    order = sequential.draw(scores, features, alive, k, temperature, noise)
    weight = torch.randn(order.shape, generator=torch.Generator().manual_seed(3))

    def total(x: Tensor) -> Tensor:
        return (
            (sequential.log_prob(x, features, alive, k, temperature, order) * weight).double().sum()
        )

    variable = scores.double().requires_grad_()
    total(variable).backward()
    assert variable.grad is not None
    for i, v in itertools.product(range(2), range(7)):
        moved = torch.zeros_like(scores, dtype=torch.float64)
        moved[i, v] = 1e-2
        slope = (total(scores.double() + moved) - total(scores.double() - moved)) / 2e-2
        assert float(variable.grad[i, v]) == pytest.approx(float(slope), abs=2e-3)


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, features, alive = world(images=3)
    k = torch.tensor([3, 2, 1])
    noise = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(4))

    def results() -> list[Tensor]:
        x = scores.clone().requires_grad_()
        order = sequential.draw(scores, features, alive, k, 1.0, noise)
        log_prob = sequential.log_prob(x, features, alive, k, 1.0, order)
        (grad,) = torch.autograd.grad(log_prob.sum(), x)
        return [order, log_prob.detach(), grad, sequential.greedy(scores, features, alive, k)]

    whole = results()
    monkeypatch.setattr(sequential, "PORTION", 1)
    for a, b in zip(whole, results(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("tokens", "width", "k"), [(40, 8, 5), (40, 8, 30), (144, 64, 16), (60, 3, 60)]
)
def test_greedy_equals_the_cholesky_of_the_explicit_kernel(tokens: int, width: int, k: int) -> None:
    scores, features, alive = world(images=3, tokens=tokens, width=width, seed=k)
    count = torch.minimum(torch.tensor([k, k - 1, k]), alive.sum(1))
    q = (0.5 * sequential.log_gains(scores, alive, count)).exp()
    similarity = features.double() @ features.double().mT + JITTER * torch.eye(
        tokens, dtype=torch.float64
    )
    kernel = q.unsqueeze(1) * similarity * q.unsqueeze(2)
    assert torch.equal(
        sequential.greedy(scores, features, alive, count), dpp.greedy_map(kernel, alive, count)
    )


def test_greedy_takes_the_largest_gain_by_determinants_and_the_lower_index_of_two() -> None:
    scores, features, alive = world(images=1, seed=5)
    chosen: list[int] = []
    for _ in range(4):
        chosen.append(int(naive_gains(scores[0], features[0], chosen).argmax()))
    got = sequential.greedy(scores, features, alive, torch.tensor([4]))
    assert got[0].nonzero().flatten().tolist() == sorted(chosen)
    equal = sequential.greedy(
        torch.zeros(1, 3), torch.eye(3)[None], torch.ones(1, 3).bool(), torch.tensor([2])
    )
    assert equal.tolist() == [[True, True, False]]


def test_near_duplicates_are_not_kept_together_however_cold_the_sampling() -> None:
    """The audit's case: two copies lead; a k-DPP whose logits are tempered draws both, this policy
    what is served."""
    features = torch.eye(4)[[0, 0, 1, 2]][None]
    scores, alive, k = (
        torch.tensor([[4.0, 3.9, 1.0, 0.0]]),
        torch.ones(1, 4, dtype=torch.bool),
        torch.tensor([2]),
    )
    served = sequential.greedy(scores, features, alive, k)
    assert served.tolist() == [[True, False, True, False]]
    noise = torch.rand(1, 500, 4, generator=torch.Generator().manual_seed(0))
    shares = []
    for temperature in (1.0, 0.3, 0.1):
        drawn = sequential.draw(scores, features, alive, k, temperature, noise) > 0
        as_served = (drawn == served.unsqueeze(1)).all(2) | (
            drawn == torch.tensor([False, True, True, False])
        ).all(2)
        shares.append(float(as_served.float().mean()))
    assert shares == sorted(shares)
    assert shares[-1] > 0.99


def test_likelihood_of_a_set_is_estimated_without_bias() -> None:
    scores, features, alive = world(images=1, tokens=5)
    members = torch.tensor([[True, False, True, True, False]])
    orders = torch.tensor([[places(p, 5) for p in itertools.permutations((0, 2, 3))]])
    exact = (
        sequential.log_prob(scores, features, alive, torch.tensor([3]), 1.0, orders)
        .sum(-1)
        .exp()
        .sum()
    )
    repeat = 4000
    noise = torch.rand(repeat, 1, 5, generator=torch.Generator().manual_seed(0))
    each = [x.expand(repeat, *x.shape[1:]) for x in (scores, features, alive, members)]
    estimates = sequential.log_stay(*each, 1.0, noise).sum((1, 2)).exp()
    error = float(estimates.std()) / math.sqrt(repeat)
    assert abs(float(estimates.mean() - exact)) < 4 * error + 1e-6


def test_raising_the_likelihood_of_a_set_makes_it_the_served_one() -> None:
    """The gradient of the set's likelihood reaches a set that constant logits do not serve."""
    _, features, alive = world(images=1, tokens=6)
    members = torch.tensor([[True, True, False, True, False, False]])
    scores = torch.zeros(1, 6, requires_grad=True)
    assert not torch.equal(sequential.greedy(scores, features, alive, torch.tensor([3])), members)
    for step in range(60):
        noise = torch.rand(1, 1, 6, generator=torch.Generator().manual_seed(step))
        loss = -sequential.log_stay(scores, features, alive, members, 1.0, noise).sum()
        (grad,) = torch.autograd.grad(loss, scores)
        scores = (scores - 0.5 * grad).detach().requires_grad_()
    assert torch.equal(sequential.greedy(scores, features, alive, torch.tensor([3])), members)


@pytest.mark.parametrize("k", [0, 1, 7])
def test_all_and_none(k: int) -> None:
    scores, features, alive = world(images=1)
    count, noise = torch.tensor([k]), torch.rand(1, 2, 7)
    order = sequential.draw(scores, features, alive, count, 1.0, noise)
    assert (order > 0).sum(2).tolist() == [[k, k]]
    assert bool(sequential.log_prob(scores, features, alive, count, 1.0, order).isfinite().all())
    assert int(sequential.greedy(scores, features, alive, count).sum()) == k


def test_extreme_scores_stay_finite() -> None:
    _, features, alive = world()
    k = torch.tensor([3, 2])
    scores = torch.tensor([[1e4, -1e4, 0, 1, 2, 3, 4]] * 2).requires_grad_()
    order = sequential.draw(scores, features, alive, k, 1.0, torch.rand(2, 3, 7))
    log_prob = sequential.log_prob(scores, features, alive, k, 1.0, order)
    (grad,) = torch.autograd.grad(log_prob.sum(), scores)
    assert bool(log_prob.isfinite().all() and grad.isfinite().all())
    assert bool((log_prob <= 1e-6).all())


def test_a_kept_token_costs_eight_kernels() -> None:
    """On a GPU every operation that is not a view is a launch, and launches are what a small
    selection costs."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.kernels += not func.is_view and "empty" not in func.name()
            return result

    scores, features, alive = world(images=4, tokens=96, width=16)
    counts = {}
    for k in (8, 24, 40):
        with Count() as counter:
            sequential.greedy(scores, features, alive, torch.full((4,), k))
        counts[k] = counter.kernels
    assert counts[40] - counts[24] == counts[24] - counts[8] == 16 * 8
    assert counts[40] <= 40 * 8 + 40


def test_flops_of_the_selection_are_what_the_counter_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    scores, features, alive = world(images=1, tokens=30, width=6)
    with FlopCounterMode(display=False) as counter:
        sequential.greedy(scores, features, alive, torch.tensor([9]))
    assert counter.get_total_flops() == cost.greedy_flops(30, 6, kept=9)


def test_a_set_is_a_mask_of_its_sequence() -> None:
    masks = subsets(5, 2)
    assert len(masks) == 10
    order = torch.tensor([places((3, 1), 5)])
    assert bool(((order > 0) == masks).all(1).any())


class TestStart:
    """Tokens that are there already: what follows is chosen by its gains beside them."""

    CORE: tuple[int, ...] = (5, 2)

    def test_greedy_continues_from_it(self) -> None:
        scores, features, alive = world(images=1)
        start = torch.zeros_like(alive)
        start[0, list(self.CORE)] = True
        keep = sequential.greedy(scores, features, alive, torch.tensor([4]), start)
        chosen = list(self.CORE)
        for _ in range(2):
            chosen.append(int(naive_gains(scores[0], features[0], chosen).argmax()))
        assert sorted(chosen) == keep[0].nonzero().squeeze(1).tolist()

    def test_draws_continue_from_it_in_proportion_to_the_gains(self) -> None:
        scores, features, alive = world(images=1)
        start = torch.tensor([[places(self.CORE, 7)]]).expand(1, 4000, -1)
        noise = torch.rand(1, 4000, 7, generator=torch.Generator().manual_seed(1))
        order = sequential.draw(scores, features, alive, torch.tensor([3]), 1.0, noise, start)
        assert bool((order[..., list(self.CORE)] == torch.tensor([1, 2])).all())
        counts = (order == 3).sum(1)[0]
        gains = naive_gains(scores[0], features[0], list(self.CORE))
        assert (counts / 4000 - gains / gains.sum()).abs().max() < 0.03

    def test_a_start_of_nothing_draws_the_same(self) -> None:
        scores, features, alive = world()
        k, noise = torch.tensor([3, 2]), torch.rand(2, 5, 7, generator=torch.Generator())
        none = torch.zeros(2, 5, 7, dtype=torch.long)
        plain = sequential.draw(scores, features, alive, k, 1.0, noise)
        assert torch.equal(plain, sequential.draw(scores, features, alive, k, 1.0, noise, none))
        empty = torch.zeros_like(alive)
        greedy = sequential.greedy(scores, features, alive, k, empty)
        assert torch.equal(greedy, sequential.greedy(scores, features, alive, k))
