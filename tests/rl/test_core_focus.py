"""Episodes with a shared core: what is drawn, and how likely."""

import torch
from tests.policy.test_sequential import naive_gains

from tprl.budget import core_budget
from tprl.policy.action import ActionRule
from tprl.policy.dpp import unit_features
from tprl.policy.networks import PolicyInput, PolicyNet
from tprl.rl.core_focus import blind_input, collect_turns, evaluate_turns
from tprl.rl.rollout import Rollout

V, GROUP, TURNS, SHARE = 12, 3, 2, 0.5
RULE = ActionRule("sequential", quality=2.0)
RATIO = torch.tensor([0.5, 0.5, 1 / 3, 1 / 3], dtype=torch.float64).repeat_interleave(GROUP)


def world() -> tuple[PolicyNet, PolicyInput]:
    """Two images with two questions each, and a policy that hears them."""
    torch.manual_seed(0)
    net = PolicyNet(5, 6, width=16, layers=1, heads=2)
    with torch.no_grad():
        net.policy_head.out.weight.mul_(200)
    codes, places = torch.randn(2, V, 5), torch.rand(2, V, 2)
    mask = torch.ones(4, V, dtype=torch.bool)
    codes, places = (part.repeat_interleave(TURNS, 0) for part in (codes, places))
    words = torch.randn(4, 3, 6), torch.ones(4, 3, dtype=torch.bool)
    features = unit_features(codes, mask)
    sizes = ((V,),) * 4
    return net, PolicyInput(codes, places, mask, *words, features=features, sizes=sizes)


def episodes(net: PolicyNet, x: PolicyInput) -> Rollout:
    draw = torch.Generator().manual_seed(1)
    core_noise = torch.rand(2 * GROUP, V, generator=draw)
    noise = torch.rand(4 * GROUP, V, generator=draw)
    return collect_turns(net, x, RULE, SHARE, RATIO, core_noise, noise, GROUP, TURNS)


def test_questions_about_an_image_share_the_core_of_an_episode() -> None:
    net, x = world()
    rollout = episodes(net, x)
    assert rollout.core is not None
    core = rollout.core[0].view(2, TURNS, GROUP, V)
    keep = rollout.keep[0].view(2, TURNS, GROUP, V)
    assert torch.equal(core[:, 0], core[:, 1])
    assert keep.sum(-1).tolist() == [[[6] * GROUP] * TURNS, [[4] * GROUP] * TURNS]
    assert core.sum(-1).tolist() == [[[3] * GROUP] * TURNS, [[2] * GROUP] * TURNS]
    assert bool((core <= keep).all())
    assert not torch.equal(keep[:, 0], keep[:, 1])
    assert not torch.equal(core[:, :, 0], core[:, :, 1])


def test_draws_have_the_probability_of_their_gains_given_those_before() -> None:
    """By determinants: the core under logits without the question, the focus under those with."""
    net, x = world()
    rollout = episodes(net, x)
    log_prob, _, _ = evaluate_turns(net, x, RULE, rollout, RATIO, SHARE, GROUP)
    assert torch.equal(log_prob, rollout.log_prob[0])
    for row in (1, 4, 7, 11):
        question, order = row // GROUP, rollout.action[0, row]
        ratio, count = RATIO[row : row + 1], int(order.max())
        first = core_budget(SHARE, count)
        one = x.rows(torch.tensor([question]))
        with torch.no_grad():
            served = torch.tensor([first / V], dtype=torch.float64)
            blind = net(blind_input(one), one.mask, 0, served)[0][0]
            heard = net(one, one.mask, 0, ratio)[0][0]
        chosen: list[int] = []
        assert one.features is not None
        for place in range(1, count + 1):
            logits = blind if place <= first else heard
            gains = naive_gains(2 * logits, one.features[0], chosen)
            item = int((order == place).nonzero())
            expected = (gains[item] / gains.sum()).log()
            torch.testing.assert_close(log_prob[row, item].double(), expected, atol=2e-4, rtol=0)
            chosen.append(item)
    assert not bool(log_prob[rollout.action[0] == 0].any())


def test_no_word_moves_the_likelihood_of_the_core() -> None:
    net, x = world()
    rollout = episodes(net, x)
    other = x._replace(query=x.query * -3)
    log_prob, _, _ = evaluate_turns(net, other, RULE, rollout, RATIO, SHARE, GROUP)
    assert rollout.core is not None
    core, focus = rollout.core[0], rollout.keep[0] & ~rollout.core[0]
    torch.testing.assert_close(log_prob[core], rollout.log_prob[0][core])
    assert float((log_prob[focus] - rollout.log_prob[0][focus]).abs().max()) > 0.01
