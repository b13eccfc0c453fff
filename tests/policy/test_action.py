import math

import pytest
import torch
from tests.policy.inputs import features, subsets

from tprl.errors import UserError
from tprl.policy.action import ActionRule, Select, act, noise_width, serve

RULES = [
    ActionRule("bernoulli"),
    ActionRule("subset", temperature=0.5),
    ActionRule("dpp"),
    ActionRule("sequential", temperature=0.7),
]
EXACT = RULES[1:]
IDS = [rule.kind for rule in RULES]


def state(b: int = 4, v: int = 20, seed: int = 0, scale: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(b, v, generator=generator) < 0.7
    alive[:, :3] = True
    return {
        "logits": torch.randn(b, v, generator=generator) * scale,
        "alive": alive,
        "features": features([v] * b),
        "k": (alive.sum(1) * torch.linspace(0.2, 1.0, b)).long().clamp(min=1),
        "noise": torch.rand(b, 2 * v, generator=generator),
    }


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("t", [0, 1, 2])
def test_evaluating_a_sampled_action_gives_the_very_same_log_probability(
    rule: ActionRule, t: int
) -> None:
    s = state(seed=t)
    action, sampled, entropy = act(
        s["logits"], s["alive"], rule, t, **only(s, "k", "features", "noise")
    )
    logits = s["logits"].requires_grad_()
    again, evaluated, entropy_again = act(
        logits, s["alive"], rule, t, **only(s, "k", "features"), action=action
    )
    assert torch.equal(action, again)
    assert torch.equal(sampled, evaluated.detach())
    assert torch.equal(entropy, entropy_again.detach())
    assert not bool(((action > 0) & ~s["alive"]).any())


def only(s: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: s[name] for name in names}


def test_bernoulli_log_probabilities_are_literals() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0), 50.0]])
    alive = torch.tensor([[True, True, True, False]])
    action = torch.tensor([[True, False, True, False]])
    _, log_prob, entropy = act(
        logits, alive, ActionRule("bernoulli", discount=0.5), 1, action=action
    )
    # p = 0.5 * (1/2, 3/4, 1/4)
    torch.testing.assert_close(log_prob.exp(), torch.tensor([[0.25, 0.625, 0.125, 1.0]]))
    expected = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.25, 0.375, 0.125)]
    torch.testing.assert_close(entropy, torch.tensor([[*expected, 0.0]]))
    assert log_prob[0, 3] == 0


def test_bernoulli_frequencies_follow_the_discount_and_the_temperature() -> None:
    rule = ActionRule("bernoulli", discount=0.5, temperature=2.0)
    noise = torch.rand(2, 20_000, 3, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([[2.0, -2.0, 0.0], [0.0, 4.0, 2.0]])
    action, _, _ = act(logits, torch.ones(2, 3, dtype=torch.bool), rule, 2, noise=noise)
    assert action.shape == (2, 20_000, 3)
    # A draw of nothing becomes the likeliest token.
    p = 0.25 * (logits / 2).sigmoid()
    expected = p.clone()
    expected[[0, 1], [0, 1]] += (1 - p).prod(1)
    torch.testing.assert_close(action.float().mean(1), expected, atol=0.015, rtol=0)


def test_a_forced_token_is_in_the_stored_action_and_in_its_log_probability() -> None:
    logits, alive = torch.tensor([[5.0, 1.0, 2.0, 2.0]]), torch.tensor([[False, True, True, True]])
    noise = torch.full((1, 4), 0.99999)
    action, log_prob, _ = act(logits, alive, ActionRule("bernoulli"), 1, noise=noise)
    # the likeliest alive one, the lower index of two
    assert action.tolist() == [[False, False, True, False]]
    p = 0.5 * logits.sigmoid()
    expected = torch.stack(
        [torch.zeros(1), (1 - p[:, 1]).log(), p[:, 2].log(), (1 - p[:, 3]).log()], 1
    )
    torch.testing.assert_close(log_prob, expected)


@pytest.mark.parametrize("rule", EXACT, ids=IDS[1:])
def test_exact_kinds_keep_exactly_k(rule: ActionRule) -> None:
    for seed in range(5):
        s = state(seed=seed, scale=10)
        action, _, _ = act(s["logits"], s["alive"], rule, 0, **only(s, "k", "features", "noise"))
        assert torch.equal((action > 0).sum(1), s["k"])


@pytest.mark.parametrize("rule", EXACT, ids=IDS[1:])
def test_a_common_offset_changes_nothing(rule: ActionRule) -> None:
    s = state()
    action, log_prob, entropy = act(
        s["logits"], s["alive"], rule, 0, **only(s, "k", "features", "noise")
    )
    moved = act(s["logits"] + 8.0, s["alive"], rule, 0, **only(s, "k", "features", "noise"))
    assert torch.equal(action, moved[0])
    # float32 logits
    torch.testing.assert_close((log_prob, entropy), moved[1:], atol=2e-4, rtol=1e-4)
    logits = s["logits"].requires_grad_()
    act(logits, s["alive"], rule, 0, **only(s, "k", "features"), action=action)[1].sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["subset", "dpp"])
def test_set_probabilities_of_all_subsets_sum_to_one(kind: str) -> None:
    masks = subsets(6, 3)
    logits, alive = (
        torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0, -1.0]]),
        torch.ones(1, 6, dtype=torch.bool),
    )
    alike = features([6])
    rule = ActionRule(kind, temperature=0.7)
    _, log_prob, _ = act(
        logits, alive, rule, 0, k=torch.tensor([3]), features=alike, action=masks[None]
    )
    assert log_prob.shape == (1, 20, 1)
    assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_subset_entropy_is_exact_per_kept_token() -> None:
    k, alive = torch.tensor([2]), torch.tensor([[True, True, True, True, False]])
    action = torch.tensor([[True, True, False, False, False]])
    _, log_prob, entropy = act(
        torch.zeros(1, 5), alive, ActionRule("subset"), 0, k=k, action=action
    )
    assert log_prob.item() == pytest.approx(-math.log(6))
    assert entropy.item() == pytest.approx(math.log(6) / 2)


def test_dpp_entropy_is_one_for_equal_logits_and_zero_for_one_token() -> None:
    alike = features([4, 4])
    alive = torch.tensor([[True] * 4, [True, False, False, False]])
    action = torch.tensor([[True, False, False, False]] * 2)
    k = torch.tensor([1, 1])
    entropy = act(
        torch.zeros(2, 4), alive, ActionRule("dpp"), 0, k=k, features=alike, action=action
    )[2]
    assert entropy.flatten().tolist() == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_log_probability_and_entropy_have_finite_gradients(rule: ActionRule, scale: float) -> None:
    s = state()
    logits = (s["logits"].sign() * scale).requires_grad_()
    _, log_prob, entropy = act(logits, s["alive"], rule, 0, **only(s, "k", "features", "noise"))
    for term in (log_prob, entropy):
        assert bool(term.isfinite().all())
        (grad,) = torch.autograd.grad(term.sum(), logits, retain_graph=True)
        assert bool(grad.isfinite().all())
        assert not bool(grad[~s["alive"]].any())
    assert bool((log_prob <= 1e-4).all())


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_policy_gradient_step_makes_the_action_likelier(rule: ActionRule) -> None:
    s = state(scale=0.5)
    logits, remainder = s["logits"].requires_grad_(), only(s, "k", "features")
    action = act(logits, s["alive"], rule, 1, **remainder, noise=s["noise"])[0]
    before = act(logits, s["alive"], rule, 1, **remainder, action=action)[1].sum(1)
    (grad,) = torch.autograd.grad(before.sum(), logits)
    after = act(logits + 0.01 * grad, s["alive"], rule, 1, **remainder, action=action)[1].sum(1)
    full = s["k"] == s["alive"].sum(1) if rule.per_set else torch.zeros(4, dtype=torch.bool)
    assert bool((after > before)[~full].all())
    # keeping everything is certain: nothing to learn
    torch.testing.assert_close(after[full], before[full])


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_padding_and_batch_order_change_nothing(rule: ActionRule) -> None:
    s, pad = state(), 7
    whole = act(s["logits"], s["alive"], rule, 1, **only(s, "k", "features", "noise"))
    padded = act(
        torch.nn.functional.pad(s["logits"], (0, pad), value=99.0),
        torch.nn.functional.pad(s["alive"], (0, pad), value=False),
        rule,
        1,
        k=s["k"],
        features=torch.nn.functional.pad(s["features"], (0, 0, 0, pad)),
        noise=torch.nn.functional.pad(s["noise"], (0, 2 * pad), value=0.5),
    )
    for got, expected in zip(padded, whole, strict=True):
        torch.testing.assert_close(got[:, : expected.shape[1]], expected)
        assert not bool(got[:, expected.shape[1] :].any())
    order = torch.tensor([3, 1, 0, 2])
    permuted = act(s["logits"][order], s["alive"][order], rule, 1, **rows(s, order))
    for got, expected in zip(permuted, whole, strict=True):
        torch.testing.assert_close(got, expected[order])
    for i in range(4):
        alone = act(
            *(s[n][i : i + 1] for n in ("logits", "alive")), rule, 1, **rows(s, slice(i, i + 1))
        )  # type: ignore[arg-type]
        for got, expected in zip(alone, whole, strict=True):
            torch.testing.assert_close(got, expected[i : i + 1])


def rows(s: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    return {name: s[name][index] for name in ("k", "features", "noise")}


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_group_of_actions_equals_repeated_states(rule: ActionRule) -> None:
    s, group = state(), 3
    noise = torch.rand(4, group, 40, generator=torch.Generator().manual_seed(5))
    shared = act(s["logits"], s["alive"], rule, 0, **only(s, "k", "features"), noise=noise)
    repeated = {
        name: s[name].repeat_interleave(group, 0) for name in ("logits", "alive", "k", "features")
    }
    logits, alive = repeated.pop("logits"), repeated.pop("alive")
    each = act(logits, alive, rule, 0, **repeated, noise=noise.flatten(0, 1))
    for got, expected in zip(shared, each, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), expected)


def test_a_sample_without_tokens_keeps_none() -> None:
    logits, alive = torch.zeros(2, 4), torch.tensor([[False] * 4, [True] * 4])
    alike, noise = features([4, 4]), torch.rand(2, 8)
    for rule in RULES:
        k = torch.tensor([0, 2])
        action, log_prob, entropy = act(logits, alive, rule, 0, k=k, features=alike, noise=noise)
        assert not bool(action[0].any())
        assert bool(action[1].any())
        assert not bool(log_prob[0].any())
        assert not bool(entropy[0].any())


def test_impossible_requests_are_refused() -> None:
    s = state()
    logits, alive, rule = s["logits"], s["alive"], ActionRule("subset")
    with pytest.raises(ValueError, match="either an action"):
        act(logits, alive, rule, 0, k=s["k"])
    with pytest.raises(ValueError, match="give k"):
        act(logits, alive, rule, 0, noise=s["noise"])
    with pytest.raises(ValueError, match="more than the tokens alive"):
        act(logits, alive, rule, 0, k=alive.sum(1) + 1, noise=s["noise"])
    with pytest.raises(ValueError, match="exactly k alive"):
        act(logits, alive, rule, 0, k=alive.sum(1), action=torch.ones_like(alive))
    with pytest.raises(ValueError, match="features"):
        act(logits, alive, ActionRule("dpp"), 0, k=s["k"], noise=s["noise"])
    with pytest.raises(ValueError, match="19 uniforms per sample, 20 are needed"):
        act(logits, alive, rule, 0, k=s["k"], noise=s["noise"][:, :19])
    assert [noise_width(rule, 20) for rule in RULES] == [20, 20, 40, 20]
    for bad in (
        {"kind": "beta"},
        {"kind": "dpp", "temperature": 0.0},
        {"kind": "bernoulli", "discount": 1.5},
    ):
        with pytest.raises(UserError):
            ActionRule(**bad)  # type: ignore[arg-type]


def test_serving_keeps_what_its_name_says() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0, 5.0], [-3.0, -2.0, -9.0, -2.0, 5.0]])
    alive, k = torch.tensor([[True, True, True, True, False]] * 2), torch.tensor([2, 1])
    assert serve(logits, alive, k, "topk").tolist() == [
        [False, True, True, False, False],
        [False, True, False, False, False],
    ]
    assert serve(logits, alive, None, "threshold", tau=0.4).tolist() == [
        [True, True, True, False, False],
        # nothing above tau: the likeliest, the lower index of two
        [False, True, False, False, False],
    ]


def test_served_dpp_avoids_copies() -> None:
    alike = torch.eye(4)[None].clone()
    alike[0, 1] = alike[0, 0]  # tokens 0 and 1 are the same
    logits, alive = torch.tensor([[2.0, 1.9, 0.5, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    got = serve(logits, alive, torch.tensor([2]), "dpp", features=alike)
    assert got.tolist() == [[True, False, True, False]]


def test_gumbel_serving_draws_first_tokens_in_proportion_to_exp_logit() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(20_000, -1)
    noise = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    k, alive = torch.ones(20_000, dtype=torch.long), torch.ones(20_000, 3, dtype=torch.bool)
    for temperature in (1.0, 0.5):
        got = (
            serve(logits, alive, k, "gumbel", noise=noise, temperature=temperature).float().mean(0)
        )
        torch.testing.assert_close(got, (logits[0] / temperature).softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize(("kind", "select"), [("subset", "topk"), ("sequential", "dpp")])
def test_cold_sampling_is_what_is_served(kind: str, select: Select) -> None:
    s = state(seed=2)
    cold = ActionRule(kind, temperature=1e-3)
    sampled = act(s["logits"], s["alive"], cold, 0, **only(s, "k", "features", "noise"))[0]
    served = serve(s["logits"], s["alive"], s["k"], select, features=s["features"])
    assert torch.equal(sampled > 0, served)


def test_serving_without_what_it_needs_is_refused() -> None:
    logits, alive = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    for select, word in (("threshold", "tau"), ("topk", "give k")):
        with pytest.raises(ValueError, match=word):
            serve(logits, alive, None, select)  # type: ignore[arg-type]
    for select, word in (("gumbel", "noise"), ("dpp", "features")):
        with pytest.raises(ValueError, match=word):
            serve(logits, alive, torch.tensor([1]), select)  # type: ignore[arg-type]
