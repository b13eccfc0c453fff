import pytest
import torch
from tests.policy.inputs import policy_input, policy_net

from tprl.budget import budget, budgets
from tprl.errors import UserError
from tprl.policy.action import ActionRule, act, noise_width
from tprl.policy.networks import PolicyInput, PolicyNet
from tprl.rl.ppo import ppo_loss
from tprl.rl.rollout import Rollout, collect, evaluate_actions, step_budgets, step_ratios

RULES = [ActionRule("bernoulli"), ActionRule("subset"), ActionRule("dpp"), ActionRule("sequential")]
IDS = [rule.kind for rule in RULES]
TOKENS, WORDS = (30, 17, 24, 9), (4, 2, 5, 3)
RATIO = torch.tensor([0.2, 0.5, 1 / 3, 0.1], dtype=torch.float64)
STEPS = 3


def noise(b: int = 4, v: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.rand(STEPS, b, 2 * v, generator=torch.Generator().manual_seed(seed))


def sampled(
    rule: ActionRule, net: PolicyNet | None = None
) -> tuple[PolicyNet, PolicyInput, Rollout]:
    net, x = net or policy_net(sharp=200), policy_input(TOKENS, WORDS)
    return net, x, collect(net, x, rule, STEPS, RATIO, noise())


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_the_ratio_is_one_before_the_first_update_at_every_step(rule: ActionRule) -> None:
    net, x, rollout = sampled(rule)
    net.train()
    for t in range(STEPS):
        log_prob, entropy, value = evaluate_actions(net, x, rule, rollout, RATIO, t)
        assert (log_prob - rollout.log_prob[t]).abs().max().item() < 1e-6
        assert (value - rollout.value[t]).abs().max().item() < 1e-6
        assert bool((rollout.log_prob[t] != 0).any())
        loss = ppo_loss(
            log_prob, rollout.log_prob[t], torch.ones(4), entropy, value, value, rollout.alive[t]
        )
        assert loss.ratio_max.item() == pytest.approx(1, abs=1e-6)
        assert loss.kl.item() == pytest.approx(0, abs=1e-6)
        assert loss.clip_fraction.item() == 0
        assert loss.policy.item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_the_ratio_leaves_one_after_an_update(rule: ActionRule) -> None:
    net, x, rollout = sampled(rule)
    with torch.no_grad():
        net.policy_head.out.weight.mul_(1.5)
    log_prob, _, _ = evaluate_actions(net, x, rule, rollout, RATIO, 1)
    assert (log_prob - rollout.log_prob[1]).abs().max().item() > 1e-3


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_each_step_prunes_what_the_one_before_left(rule: ActionRule) -> None:
    _, x, rollout = sampled(rule)
    assert torch.equal(rollout.alive[0], x.mask)
    for t in range(STEPS):
        assert not bool((rollout.keep[t] & ~rollout.alive[t]).any())
        assert bool(rollout.action[t].any(1).all())
        if t:
            assert torch.equal(rollout.alive[t], rollout.keep[t - 1])
        if rule.exact:
            assert torch.equal(rollout.keep[t].sum(1), step_budgets(RATIO, TOKENS, STEPS, t))
    if rule.exact:
        expected = [budget(float(r), n) for r, n in zip(RATIO, TOKENS, strict=True)]
        assert rollout.keep[-1].sum(1).tolist() == expected == [6, 9, 8, 1]


def test_a_forced_token_is_stored_as_executed() -> None:
    net, x = policy_net(sharp=200), policy_input(TOKENS, WORDS)
    rule = ActionRule("bernoulli")
    rollout = collect(net, x, rule, STEPS, RATIO, torch.full((STEPS, 4, 30), 1 - 2**-24))
    assert rollout.action[0].sum(1).tolist() == [1, 1, 1, 1]
    log_prob, _, _ = evaluate_actions(net, x, rule, rollout, RATIO, 0)
    logits, _ = net(x, x.mask, 0, RATIO)
    forced = logits.masked_fill(~x.mask, -torch.inf).argmax(1)
    assert torch.equal(rollout.action[0].int().argmax(1), forced)
    kept = log_prob.gather(1, forced[:, None])
    torch.testing.assert_close(kept, logits.gather(1, forced[:, None]).sigmoid().log())
    assert torch.equal(log_prob.detach(), rollout.log_prob[0])


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_sample_alone_or_in_another_order_gives_the_same(rule: ActionRule) -> None:
    net, x, rollout = sampled(rule)
    order, zero = torch.tensor([2, 3, 0, 1]), torch.zeros(1)
    permuted = collect(net, x.rows(order), rule, STEPS, RATIO[order], noise()[:, order])
    for got, expected in zip(permuted[:4], rollout.rows(order)[:4], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for i, n in enumerate(TOKENS):
        entry = policy_input(TOKENS[i : i + 1], WORDS[i : i + 1], seeds=[i])
        alone = collect(net, entry, rule, STEPS, RATIO[i : i + 1], noise()[:, i : i + 1])
        for got, expected in zip(alone[:4], rollout.rows(slice(i, i + 1))[:4], strict=True):
            width = n if expected.ndim == 3 and expected.shape[2] > 1 else None
            torch.testing.assert_close(
                got, expected[:, :, :width] if width else expected, atol=1e-4, rtol=1e-4
            )
        for t in range(STEPS):
            parts = evaluate_actions(net, entry, rule, alone, RATIO[i : i + 1], t)
            whole = evaluate_actions(net, x, rule, rollout, RATIO, t)
            row = slice(i, i + 1)
            cut = (whole[0][row], whole[1][row], whole[2][row])
            losses = [
                ppo_loss(log_prob, old.log_prob[t], zero + 0.7, entropy, value, zero, old.alive[t])
                for (log_prob, entropy, value), old in ((parts, alone), (cut, rollout.rows(row)))
            ]
            torch.testing.assert_close(losses[0].total, losses[1].total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_groups_share_the_first_step_without_changing_it(rule: ActionRule) -> None:
    net, group = policy_net(sharp=200), 3
    x = policy_input(TOKENS, WORDS)
    episodes = x.rows(torch.arange(4).repeat_interleave(group))
    ratio, uniforms = RATIO.repeat_interleave(group), noise(4 * group)
    shared = collect(net, x, rule, STEPS, ratio, uniforms, group=group)
    plain = collect(net, episodes, rule, STEPS, ratio, uniforms)
    for got, expected in zip(shared, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(shared.action[0, 0], shared.action[0, 1])
    grads = []
    for seen, size in ((x, group), (episodes, 1)):
        net.zero_grad()
        log_prob, entropy, value = evaluate_actions(net, seen, rule, plain, ratio, 0, group=size)
        (log_prob.sum() + entropy.sum() + value.square().sum()).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="12 episodes of 4 prompts are not groups of 5"):
        collect(net, x, rule, STEPS, ratio, uniforms, group=5)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_entropy_reaches_the_policy_head_and_value_the_value_head(rule: ActionRule) -> None:
    net, x, rollout = sampled(rule)
    for t in range(STEPS):
        log_prob, entropy, value = evaluate_actions(net, x, rule, rollout, RATIO, t)
        old, alive, zero = rollout.log_prob[t], rollout.alive[t], torch.zeros(4)
        for only_entropy, heads in ((True, (True, False)), (False, (False, True))):
            loss = ppo_loss(
                log_prob, old, zero, entropy, value, zero + 5, alive,
                entropy_coef=float(only_entropy), value_coef=float(not only_entropy),
            ).total  # fmt: skip
            weights = [net.policy_head.out.weight, net.value_head.out.weight, net.code_in[1].weight]
            grads = torch.autograd.grad(loss, weights, retain_graph=True)
            assert tuple(bool(g.abs().max() > 1e-6) for g in grads) == (*heads, True)


def test_collect_leaves_no_trace_on_the_policy() -> None:
    net = policy_net().train()
    _, _, rollout = sampled(RULES[1], net)
    assert net.training
    assert not rollout.log_prob.requires_grad
    rows = rollout.rows(torch.tensor([2, 0]))
    assert torch.equal(rows.action[1, 0], rollout.action[1, 2])
    assert torch.equal(rows.value[:, 1], rollout.value[:, 0])


def test_step_ratios_shrink_geometrically_to_the_keep_ratio() -> None:
    assert step_ratios(0.125, 3) == pytest.approx([0.5, 0.25, 0.125])
    assert step_ratios(1 / 9, 1) == [1 / 9]
    assert step_ratios(1 / 3, 3)[-1] == 1 / 3
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        step_ratios(0.5, 0)


@pytest.mark.parametrize("ratio", [0.05, 1 / 9, 0.222, 1 / 3, 0.7, 5 / 6, 1.0])
def test_step_budgets_never_rise_and_end_at_the_budget(ratio: float) -> None:
    sizes = [0, 1, 2, 3, 5, 12, 144, 255, 576]
    mask = torch.arange(576) < torch.tensor(sizes)[:, None]
    keep_ratio = torch.full((9,), ratio, dtype=torch.float64)
    for steps in (1, 2, 3, 5):
        counts = torch.stack([step_budgets(keep_ratio, sizes, steps, t) for t in range(steps)])
        assert bool((counts.diff(dim=0) <= 0).all())
        assert bool((counts <= mask.sum(1)).all())
        assert torch.equal(counts[-1], budgets(ratio, mask))


def test_float32_ratios_are_read_as_the_decimal_they_mean() -> None:
    assert budget(0.7, 5) == 4
    assert budget(float(torch.tensor(0.7)), 5) == 3
    assert step_budgets(torch.tensor([0.7]), [5], 1, 0).tolist() == [4]


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_images_of_a_sample_are_pruned_independently(rule: ActionRule) -> None:
    net, x = policy_net(sharp=200), policy_input((30, 17), (4, 2))
    image = torch.zeros(2, 30, dtype=torch.long)
    image[0, 12:] = 1
    x, ratio = x._replace(image=image), torch.tensor([0.25, 0.5], dtype=torch.float64)
    rollout = collect(net, x, rule, 1, ratio, noise(2)[:1])
    action, keep = rollout.action[0], rollout.keep[0]
    if rule.exact:
        assert [int(keep[0, :12].sum()), int(keep[0, 12:].sum()), int(keep[1].sum())] == [3, 5, 9]
    log_prob, entropy, _ = evaluate_actions(net, x, rule, rollout, ratio, 0)
    assert torch.equal(log_prob, rollout.log_prob[0])
    logits = net(x, x.mask, 0, ratio)[0]
    parts = []
    for part, k in ((slice(0, 12), 3), (slice(12, 30), 5)):
        assert x.features is not None
        parts.append(
            act(
                logits[:1, part],
                x.mask[:1, part],
                rule,
                0,
                k=torch.tensor([k]),
                features=x.features[:1, part],
                action=action[:1, part],
            )
        )
    assert torch.allclose(
        log_prob[0].sum(), torch.stack([result[1].sum() for result in parts]).sum(), atol=1e-5
    )
    joined = torch.cat([result[2].flatten() for result in parts])
    assert torch.allclose(entropy[0].mean(), joined.mean(), atol=1e-5)


def test_noise_of_the_stated_width_is_enough() -> None:
    net, x = policy_net(), policy_input(TOKENS, WORDS)
    for rule in RULES:
        width = noise_width(rule, 30)
        collect(net, x, rule, STEPS, RATIO, noise()[..., :width])
        with pytest.raises(ValueError, match="are needed"):
            collect(net, x, rule, STEPS, RATIO, noise()[..., : width - 1])
