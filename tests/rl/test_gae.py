import pytest
import torch

from tprl.rl.gae import gae, group_advantage, leave_one_out


def test_gae_of_a_hand_computed_case() -> None:
    # deltas: 2 + .99*.25 - 1 = 1.2475; 0.5 + .99*(-1) - .25 = -0.74; -1 - (-1) = 0; gamma * lambda
    # = 0.9405
    reward, value = torch.tensor([[2.0], [0.5], [-1.0]]), torch.tensor([[1.0], [0.25], [-1.0]])
    advantage, target = gae(reward, value, gamma=0.99, lam=0.95)
    expected = torch.tensor([[1.2475 - 0.9405 * 0.74], [-0.74], [0.0]])
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(target, torch.tensor([[1.55153], [-0.49], [-1.0]]))


def test_lambda_one_is_the_discounted_return_and_lambda_zero_one_step() -> None:
    reward, value = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [5.0], [7.0]])
    assert gae(reward, value, 0.5, 1.0)[1].flatten().tolist() == [3.0, 4.0, 4.0]
    assert gae(reward, value, 0.5, 0.0)[0].flatten().tolist() == [0.5, 0.5, -3.0]


def test_episodes_are_separate_and_nothing_follows_their_end() -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    whole = gae(reward, value, 0.99, 0.95)
    for b in range(5):
        alone = gae(reward[:, b : b + 1], value[:, b : b + 1], 0.99, 0.95)
        for got, expected in zip(alone, whole, strict=True):
            assert torch.equal(got[:, 0], expected[:, b])
    torch.testing.assert_close(whole[0][2], reward[2] - value[2])


def test_advantages_carry_no_gradient_to_the_critic() -> None:
    value = torch.zeros(2, 1, requires_grad=True)
    assert not gae(torch.ones(2, 1), value, 0.99, 0.95)[1].requires_grad


def test_gae_agrees_with_torchrl() -> None:
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    generator = torch.Generator().manual_seed(1)
    reward, value = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    following = torch.cat([value[1:], torch.zeros(1, 6)])
    done = torch.zeros(6, 4, 1, dtype=torch.bool)
    done[:, -1] = True
    parts = [x.T.unsqueeze(-1) for x in (value, following, reward)]
    expected = functional.generalized_advantage_estimate(0.9, 0.8, *parts, done)
    for got, want in zip(gae(reward, value, 0.9, 0.8), expected, strict=True):
        torch.testing.assert_close(got, want.squeeze(-1).T)


def test_group_advantage_of_literals() -> None:
    got = group_advantage(torch.tensor([1.0, 3.0, 5.0, 5.0]), group=2, eps=0.0001)
    torch.testing.assert_close(got, torch.tensor([-1 / 1.0001, 1 / 1.0001, 0.0, 0.0]))
    assert group_advantage(torch.tensor([4.0, 2.0]), group=1).tolist() == [0.0, 0.0]


def test_incomplete_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="5 returns are not whole groups of 2"):
        group_advantage(torch.zeros(5), group=2)


class TestLeaveOneOut:
    def test_literal(self) -> None:
        """Group 1: 3 - (0 + 0) / 2 = 3, 0 - (3 + 0) / 2 = -1.5 twice; group 2 is all equal."""
        result = leave_one_out(torch.tensor([3.0, 0.0, 0.0, 7.0, 7.0, 7.0]), 3)
        assert result.tolist() == [3.0, -1.5, -1.5, 0.0, 0.0, 0.0]

    def test_whole_groups_only(self) -> None:
        with pytest.raises(ValueError, match="whole groups"):
            leave_one_out(torch.zeros(5), 2)
