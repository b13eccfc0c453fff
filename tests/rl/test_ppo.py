import math

import pytest
import torch

from tprl.rl.ppo import PPOLoss, explained_variance, normalize, ppo_loss


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # inside the range: -r A, and the gradient to the log-probability is the same number
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # outside on the profitable side: clipped to 1.2 or 0.8, no gradient
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        # outside on the harmful side: the pessimistic bound keeps the whole gradient
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_surrogate_of_literals(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    new = logs([ratio * 0.4]).requires_grad_()
    got = ppo_loss(
        new,
        logs([0.4]),
        torch.tensor([advantage]),
        torch.zeros(1, 1),
        None,
        None,
        torch.ones(1, 1).bool(),
    )
    got.total.backward()
    assert got.policy.item() == pytest.approx(loss, rel=1e-5)
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope, rel=1e-5)
    assert got.clip_fraction.item() == float(abs(ratio - 1) > 0.2)
    assert got.kl.item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)
    assert got.ratio_max.item() == pytest.approx(ratio, rel=1e-5)


def table() -> dict[str, torch.Tensor]:
    """Two samples, three tokens; the second has one alive. Ratios 2, 0.5, 1 and 1.1."""
    return {
        "new": logs([0.8, 0.2, 0.5], [0.55, 1.0, 1.0]),
        "old": logs([0.4, 0.4, 0.5], [0.5, 1.0, 1.0]),
        "advantage": torch.tensor([1.0, -1.0]),
        "entropy": torch.tensor([[0.3, 0.6, 0.0], [0.5, 9.0, 9.0]]),
        "value": torch.tensor([1.0, 2.0]),
        "target": torch.tensor([3.0, 2.0]),
        "alive": torch.tensor([[True, True, True], [True, False, False]]),
    }


def loss_of(s: dict[str, torch.Tensor], **options: object) -> PPOLoss:
    names = ("new", "old", "advantage", "entropy", "value", "target", "alive")
    return ppo_loss(*(s[name] for name in names), **options)  # type: ignore[arg-type]


def test_token_ratios_of_a_table() -> None:
    got = loss_of(table(), value_coef=0.5, entropy_coef=0.1)
    # sample 0: min(2, 1.2) = 1.2, 0.5, 1 -> mean 0.9; sample 1: -1.1
    assert got.policy.item() == pytest.approx(-(0.9 - 1.1) / 2, abs=1e-6)
    assert got.value.item() == pytest.approx(2.0)  # (4 + 0) / 2
    assert got.entropy.item() == pytest.approx((0.3 + 0.5) / 2)
    assert got.total.item() == pytest.approx(0.1 + 1.0 - 0.04, abs=1e-6)
    assert got.clip_fraction.item() == pytest.approx((2 / 3 + 0) / 2)
    assert got.ratio_max.item() == pytest.approx(2.0)
    kl = (((1 - math.log(2)) + (-0.5 - math.log(0.5)) + 0) / 3 + (0.1 - math.log(1.1))) / 2
    assert got.kl.item() == pytest.approx(kl, abs=1e-6)


def test_the_joint_ratio_is_length_normalized() -> None:
    s = table()
    s["new"] = logs([0.8, 0.4, 0.5], [0.55, 1.0, 1.0])
    got = loss_of(s, ratio="joint", value_coef=0.0, entropy_coef=0.0)
    # sample 0: (log 2 + 0 + 0) / 3 -> 2^(1/3) = 1.26, clipped to 1.2; sample 1: -1.1
    assert got.total.item() == pytest.approx(-(1.2 - 1.1) / 2, abs=1e-6)
    assert got.ratio_max.item() == pytest.approx(2 ** (1 / 3), rel=1e-5)
    assert got.clip_fraction.item() == pytest.approx(0.5)


def test_a_set_is_one_decision_for_either_ratio() -> None:
    s = table()
    s |= {"new": s["new"][:, :1], "old": s["old"][:, :1], "entropy": s["entropy"][:, :1]}
    token, joint = loss_of(s, ratio="token"), loss_of(s, ratio="joint")
    assert token.policy.item() == pytest.approx(-(1.2 - 1.1) / 2, abs=1e-6)
    assert token == joint


def test_per_token_advantages() -> None:
    s = table()
    s["advantage"] = torch.tensor([[1.0, -1.0, 0.5], [2.0, 50.0, 50.0]])
    # 1.2, min(-0.5, -0.8) = -0.8, 0.5 -> 0.3; 2.2
    assert loss_of(s).policy.item() == pytest.approx(-(0.3 + 2.2) / 2, abs=1e-6)


def test_every_term_reaches_the_gradient() -> None:
    s = table()
    leaves = [s[name].requires_grad_() for name in ("new", "entropy", "value")]
    loss_of(s, value_coef=0.5, entropy_coef=0.1).total.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    torch.testing.assert_close(s["value"].grad, torch.tensor([0.5 * 2 * (1 - 3) / 2, 0.0]))
    torch.testing.assert_close(
        s["entropy"].grad, torch.tensor([[-0.1 / 6] * 3, [-0.1 / 2, 0.0, 0.0]])
    )
    assert s["new"].grad is not None
    assert not bool(s["new"].grad[~s["alive"]].any())


def test_nothing_flows_into_what_was_stored() -> None:
    s = table()
    leaves = [s[name].requires_grad_() for name in ("old", "advantage", "target")]
    s["new"].requires_grad_()
    loss_of(s).total.backward()
    assert [leaf.grad for leaf in leaves] == [None] * 3


def test_padding_order_and_minibatches_change_nothing() -> None:
    s = table()
    whole = loss_of(s)
    padded = {n: torch.nn.functional.pad(x, (0, 4)) if x.ndim == 2 else x for n, x in s.items()}
    padded["new"] = padded["new"].masked_fill(~padded["alive"], 3.0)
    for got, expected in zip(loss_of(padded), whole, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(loss_of({n: x.flip(0) for n, x in s.items()}), whole, strict=True):
        torch.testing.assert_close(got, expected)
    halves = [loss_of({n: x[i : i + 1] for n, x in s.items()}).total for i in range(2)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole.total)


def test_samples_without_tokens_count_nowhere() -> None:
    s = table()
    more = {n: torch.cat([x, x[:1]]) for n, x in s.items()}
    more["alive"][2] = False
    for got, expected in zip(loss_of(more), loss_of(s), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_huge_log_ratio_stays_finite() -> None:
    for jump in (-500.0, 500.0):
        for advantage in (-1.0, 0.0, 1.0):
            new = torch.tensor([[jump]], requires_grad=True)
            alive = torch.ones(1, 1, dtype=torch.bool)
            got = ppo_loss(
                new,
                torch.zeros(1, 1),
                torch.tensor([advantage]),
                torch.zeros(1, 1),
                None,
                None,
                alive,
            )
            got.total.backward()
            assert all(bool(x.isfinite()) for x in got)
            assert new.grad is not None
            assert bool(new.grad.isfinite().all())


def test_without_a_critic_there_is_no_value_term() -> None:
    s = table()
    got = ppo_loss(s["new"], s["old"], s["advantage"], s["entropy"], None, None, s["alive"])
    assert got.value.item() == 0
    with pytest.raises(ValueError, match="or neither"):
        ppo_loss(s["new"], s["old"], s["advantage"], s["entropy"], s["value"], None, s["alive"])
    with pytest.raises(ValueError, match="per-token"):
        loss_of(s | {"advantage": s["new"]}, ratio="joint")


def test_normalized_advantages_have_mean_zero_and_deviation_one() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 9 + 4
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    for got in (normalize(x), normalize(x, mask)[mask]):
        assert got.mean().item() == pytest.approx(0, abs=1e-6)
        assert got.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    changed = x.masked_fill(~mask, 1e6)
    assert torch.equal(normalize(changed, mask), normalize(x, mask))
    assert not bool(normalize(x, mask)[~mask].any())
    assert normalize(torch.tensor([3.0])).tolist() == [0.0]
    assert normalize(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]
    assert normalize(torch.tensor([3.0]), torch.tensor([False])).tolist() == [0.0]


def test_explained_variance_of_literals() -> None:
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(torch.full((2, 2), 7.0), target) == pytest.approx(0.0)
    assert explained_variance(-target, target) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(target, torch.ones(2, 2)))
