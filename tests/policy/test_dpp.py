import math

import pytest
import torch
from tests.policy.inputs import subsets

from tprl.policy import dpp


def kernel(n: int, d: int, seed: int, jitter: float = 0.01) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    return x @ x.T + jitter * torch.eye(n, dtype=torch.float64)


def agrees(masks: torch.Tensor, drawn: torch.Tensor, probability: torch.Tensor) -> bool:
    """Chi-square of the drawn masks [R n] against the probabilities of all masks [C n], within 5
    sigma."""
    powers = 2 ** torch.arange(masks.shape[1])
    observed = ((drawn * powers).sum(1)[:, None] == (masks * powers).sum(1)[None]).sum(0).double()
    assert int(observed.sum()) == len(drawn), "a draw is none of the subsets"
    expected = probability * len(drawn)
    degrees = len(masks) - 1
    return float(((observed - expected) ** 2 / expected).sum()) < degrees + 5 * math.sqrt(
        2 * degrees
    )


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 3), (5, 5), (6, 0), (7, 4), (8, 7)])
def test_log_elementary_equals_enumeration(n: int, k: int) -> None:
    log_w = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * 3
    expected = torch.stack([(log_w * mask).sum(1) for mask in subsets(n, k)]).logsumexp(0)
    torch.testing.assert_close(
        dpp.log_elementary(log_w, torch.full((3,), k)), expected, atol=1e-12, rtol=1e-12
    )


def test_log_elementary_of_a_row_of_ones_is_a_binomial_coefficient() -> None:
    got = dpp.log_elementary(torch.zeros(3, 144), torch.tensor([1, 48, 144]))
    torch.testing.assert_close(
        got.double(), torch.tensor([math.log(math.comb(144, k)) for k in (1, 48, 144)]).double()
    )


def test_log_elementary_skips_dead_items_and_is_minus_infinity_beyond_them() -> None:
    log_w = torch.tensor(
        [[0.5, -torch.inf, -1.0], [0.5, -torch.inf, -1.0], [-torch.inf] * 3], dtype=torch.float64
    )
    got = dpp.log_elementary(log_w, torch.tensor([2, 3, 0]))
    assert got.tolist() == [pytest.approx(-0.5), -torch.inf, 0.0]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_log_elementary_gradient(k: int) -> None:
    log_w = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 2
    assert torch.autograd.gradcheck(
        lambda w: dpp.log_elementary(w, torch.tensor([k, k])), log_w.requires_grad_()
    )


def test_log_elementary_gradient_is_finite_with_dead_items() -> None:
    log_w = torch.tensor([[1.0, -torch.inf, 0.0, 2.0]], requires_grad=True)
    dpp.log_elementary(log_w, torch.tensor([2])).sum().backward()
    assert log_w.grad is not None
    assert log_w.grad[0, 1] == 0
    assert float(log_w.grad.sum()) == pytest.approx(2.0)


@pytest.mark.parametrize("k", [1, 5, 16, 48, 143])
def test_log_elementary_is_stable_for_extreme_weights(k: int) -> None:
    log_w = torch.where(torch.arange(144) % 29 < 2, 30.0, -30.0).double()[None].requires_grad_()
    value = dpp.log_elementary(log_w, torch.tensor([k]))
    high = int((log_w > 0).sum())
    terms = [
        math.log(math.comb(high, j)) + math.log(math.comb(144 - high, k - j)) + 30.0 * (2 * j - k)
        for j in range(max(0, k - 144 + high), min(k, high) + 1)
    ]
    assert value.item() == pytest.approx(
        float(torch.tensor(terms, dtype=torch.float64).logsumexp(0)), abs=1e-8
    )
    value.backward()
    assert log_w.grad is not None
    assert float(log_w.grad.sum()) == pytest.approx(k, abs=1e-9)
    assert bool(((log_w.grad >= 0) & (log_w.grad <= 1 + 1e-12)).all())


def test_subset_entropy_equals_enumeration_and_its_gradient_is_right() -> None:
    log_w = (
        torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    ).requires_grad_()
    k = torch.tensor([3, 3])
    scores = torch.stack([(log_w * mask).sum(1) for mask in subsets(6, 3)], 1)
    expected = -(scores.softmax(1) * scores.log_softmax(1)).sum(1)
    torch.testing.assert_close(dpp.subset_entropy(dpp.subset_law(log_w, k)), expected)
    assert torch.autograd.gradcheck(lambda w: dpp.subset_entropy(dpp.subset_law(w, k)), log_w)


def test_subset_sampler_draws_with_the_stated_probabilities() -> None:
    log_w = torch.tensor([[1.5, 0.0, -torch.inf, -1.0, 0.7, 2.0, -0.5]], dtype=torch.float64)
    law = dpp.subset_law(log_w, torch.tensor([3]))
    masks = subsets(7, 3)
    masks = masks[~masks[:, 2]]
    alive = torch.tensor([True, True, False, True, True, True, True])
    probability = (log_w[:, alive] * masks[:, alive]).sum(1).softmax(0)
    drawn = dpp.sample_subset(
        law, torch.rand(1, 40_000, 7, generator=torch.Generator().manual_seed(0))
    )
    assert agrees(masks, drawn[0], probability)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (5, 5), (9, 4), (144, 16), (145, 144)])
def test_subset_sampler_draws_exactly_k_for_any_noise(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    law = dpp.subset_law(torch.randn(4, n, generator=generator) * 15, torch.full((4,), k))
    noise = torch.rand(4, 5, n, generator=generator)
    noise[0], noise[1] = 0.0, 1 - 2**-24
    assert bool((dpp.sample_subset(law, noise).sum(-1) == k).all())


def test_subset_sampler_ignores_padding_on_the_right() -> None:
    generator = torch.Generator().manual_seed(3)
    log_w, noise, k = (
        torch.randn(2, 21, generator=generator),
        torch.rand(2, 50, generator=generator),
        torch.tensor([4, 9]),
    )
    padded = torch.cat([log_w, torch.full((2, 29), -torch.inf)], 1)
    alone = dpp.sample_subset(dpp.subset_law(log_w, k), noise)
    assert torch.equal(dpp.sample_subset(dpp.subset_law(padded, k), noise)[:, :21], alone)


def law_of(log_q: torch.Tensor, similarity: torch.Tensor, k: int) -> dpp.KDPP:
    return dpp.kdpp(
        log_q[None],
        similarity[None],
        torch.ones(1, len(log_q), dtype=torch.bool),
        torch.tensor([k]),
    )


@pytest.mark.parametrize("k", [1, 3, 6])
def test_kdpp_probabilities_are_determinants_and_sum_to_one(k: int) -> None:
    log_q = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    similarity, masks = kernel(6, 4, seed=2), subsets(6, k)
    probability = dpp.kdpp_log_prob(law_of(log_q, similarity, k), masks[None]).exp()[0]
    full = log_q.exp()[:, None] * similarity * log_q.exp()
    minors = torch.stack([torch.linalg.det(full[mask][:, mask]) for mask in masks])
    # the kernel holds 1e-6 I more than `full`
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(probability, minors / minors.sum(), atol=1e-4, rtol=1e-3)


def test_kdpp_probabilities_sum_to_one_exactly_with_dead_items_and_a_rank_deficient_kernel() -> (
    None
):
    similarity = kernel(7, 2, seed=4, jitter=0.0)[None]
    alive = torch.tensor([[True, True, False, True, True, True, True]])
    masks = subsets(7, 3)
    masks = masks[~masks[:, 2]]
    law = dpp.kdpp(torch.linspace(-1, 1, 7)[None], similarity, alive, torch.tensor([3]))
    assert float(dpp.kdpp_log_prob(law, masks[None]).exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_kdpp_sampler_draws_with_the_stated_probabilities(k: int) -> None:
    log_q = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) * 0.7
    law, masks = law_of(log_q, kernel(6, 4, seed=3), k), subsets(6, k)
    probability = dpp.kdpp_log_prob(law, masks[None]).exp()[0]
    drawn = dpp.sample_kdpp(
        law, torch.rand(1, 40_000, 12, generator=torch.Generator().manual_seed(1))
    )[0]
    assert agrees(masks, drawn, probability / probability.sum())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_kdpp_gradient_equals_finite_differences_also_for_equal_eigenvalues(k: int) -> None:
    action = torch.arange(5)[None, None] < k
    for similarity in (kernel(5, 3, seed=7), torch.eye(5, dtype=torch.float64)):
        log_q = torch.zeros(5, dtype=torch.float64) if k == 2 else torch.linspace(-1, 1, 5).double()
        log_q.requires_grad_()

        def score(q: torch.Tensor, similarity: torch.Tensor = similarity) -> torch.Tensor:
            return dpp.kdpp_log_prob(law_of(q, similarity, k), action)

        assert torch.autograd.gradcheck(score, log_q)


@pytest.mark.parametrize("k", [1, 16, 40])
def test_kdpp_of_a_degenerate_kernel_is_finite_and_exact_in_count(k: int) -> None:
    similarity = torch.ones(1, 40, 40, dtype=torch.float64)  # forty copies of one token: rank 1
    log_q = torch.linspace(-6, 6, 40, dtype=torch.float64)[None].requires_grad_()
    law = dpp.kdpp(log_q, similarity, torch.ones(1, 40, dtype=torch.bool), torch.tensor([k]))
    drawn = dpp.sample_kdpp(law, torch.rand(1, 8, 80, generator=torch.Generator().manual_seed(0)))
    assert bool((drawn.sum(-1) == k).all())
    log_prob = dpp.kdpp_log_prob(law, drawn)
    log_prob.sum().backward()
    assert log_q.grad is not None
    assert bool(log_prob.isfinite().all())
    assert bool(log_q.grad.isfinite().all())


def test_kdpp_prefers_different_items() -> None:
    similarity = torch.eye(4, dtype=torch.float64)
    similarity[0, 1] = similarity[1, 0] = 0.99
    pair = torch.tensor([[[True, True, False, False], [True, False, True, False]]])
    alike, different = dpp.kdpp_log_prob(law_of(torch.zeros(4), similarity, 2), pair)[0].tolist()
    assert different - alike == pytest.approx(-math.log(1 - 0.99**2), abs=1e-3)


def naive_map(full: torch.Tensor, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        gains = [
            -torch.inf
            if i in chosen
            else float(torch.linalg.det(full[[*chosen, i]][:, [*chosen, i]]))
            for i in range(len(full))
        ]
        chosen.append(max(range(len(full)), key=lambda i: (gains[i], -i)))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_map_equals_a_naive_loop_over_determinants(seed: int) -> None:
    kernels = torch.stack([kernel(12, 6, seed=10 * seed + b) for b in range(3)])
    k = torch.tensor([1, 4, 7])
    got = dpp.greedy_map(kernels, torch.ones(3, 12, dtype=torch.bool), k)
    assert [row.nonzero().flatten().tolist() for row in got] == [
        naive_map(full, int(n)) for full, n in zip(kernels, k, strict=True)
    ]


def test_greedy_map_fills_up_by_the_diagonal_when_the_rank_is_exhausted() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 0.0], [1.5, 0.0]])
    got = dpp.greedy_map((x @ x.T)[None], torch.ones(1, 5, dtype=torch.bool), torch.tensor([4]))
    # 0 and 1 span the plane; then 2 before 3 before 4
    assert got[0].tolist() == [True, True, True, True, False]
    three = dpp.greedy_map((x @ x.T)[None], torch.ones(1, 5, dtype=torch.bool), torch.tensor([3]))
    assert three[0].tolist() == [True, True, True, False, False]


def test_greedy_map_breaks_ties_by_the_lower_index_and_keeps_exactly_k_alive() -> None:
    alive = torch.tensor([[False, True, True, True, False, True]])
    got = dpp.greedy_map(torch.eye(6)[None], alive, torch.tensor([2]))
    assert got[0].tolist() == [False, True, True, False, False, False]
    features = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(0))
    alive = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    k = torch.tensor([1, 6, 12, 15])
    kept = dpp.greedy_map(features @ features.mT, alive, k)
    assert torch.equal(kept.sum(1), k)
    assert not bool((kept & ~alive).any())


def test_cosine_kernel_of_literals() -> None:
    features = torch.tensor([[[3.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [1.0, -2.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, True, True, False]])
    # centered by (1, 0): (2, 0), (-2, 0), (0, 2), (0, -2)
    expected = torch.tensor(
        [[1.01, -1, 0, 0], [-1, 1.01, 0, 0], [0, 0, 1.01, -1], [0, 0, -1, 1.01]]
    )
    got = dpp.cosine_kernel(features, mask)[0]
    torch.testing.assert_close(got[:4, :4], expected)
    assert not bool(got[4].any())
    assert not bool(got[:, 4].any())


def test_log_quality_is_anchored_at_the_kth_largest_and_bounded() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0, -40.0, 9.0]])
    alive = torch.tensor([[True, True, True, True, False]])
    got = dpp.log_quality(logits, alive, torch.tensor([2]), quality=2.0)
    assert got.tolist() == [[3.0, -1.0, 0.0, -6.0, 0.0]]
