import pytest
import torch
from tests.policy.inputs import policy_input, policy_net

from tprl.errors import UserError
from tprl.policy.networks import PolicyInput, PolicyNet

TOKENS, WORDS = (9, 14, 6), (4, 2, 5)
RATIO = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def close(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=2e-6, rtol=1e-5) for x, y in zip(a, b, strict=True))


def test_logits_are_small_at_initialization_and_values_are_not() -> None:
    x = policy_input((144,) * 8, (10,) * 8)
    torch.manual_seed(0)
    logits, value = PolicyNet(10, 12)(x, x.mask, 0, torch.full((8,), 0.3))
    assert 0 < float(logits.detach().abs().max()) < 0.1
    assert 0.01 < float(value.detach().abs().mean()) < 5


def test_contents_of_dead_and_padded_tokens_do_not_matter() -> None:
    net, x = policy_net(sharp=100), policy_input(TOKENS, WORDS)
    alive = x.mask & (torch.arange(14) % 3 > 0)
    expected = net(x, alive, 1, RATIO)
    dead = ~alive.unsqueeze(-1)
    changed = x._replace(
        codes=x.codes.masked_fill(dead, torch.nan),
        xy=x.xy.masked_fill(dead, torch.inf),
        query=x.query.masked_fill(~x.query_mask.unsqueeze(-1), torch.nan),
    )
    got = net(changed, alive, 1, RATIO)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert not bool(expected[0][~alive].any())


def test_alive_tokens_matter_to_each_other() -> None:
    net, x = policy_net(sharp=100), policy_input(TOKENS, WORDS)
    fewer = x.mask.clone()
    fewer[:, 0] = False
    full, part = net(x, x.mask, 0, RATIO), net(x, fewer, 0, RATIO)
    assert bool(((full[0] - part[0])[:, 1:6].abs() > 1e-4).any(1).all())
    assert bool(((full[1] - part[1]).abs() > 1e-4).all())


@pytest.mark.parametrize(
    ("query", "matters"), [("tokens", True), ("pooled", True), ("none", False)]
)
def test_the_question_matters_unless_it_is_hidden(query: str, matters: bool) -> None:
    net, x = policy_net(sharp=100, query=query), policy_input(TOKENS, WORDS)
    other = x._replace(query=x.query.flip(0), query_mask=x.query_mask.flip(0))
    before, after = net(x, x.mask, 0, RATIO), net(other, x.mask, 0, RATIO)
    assert torch.equal(before[0], after[0]) is not matters
    assert torch.equal(before[1], after[1]) is not matters


def test_the_order_of_words_matters_to_query_tokens_only() -> None:
    x = policy_input((9,), (4,))
    for query, matters in (("tokens", True), ("pooled", False)):
        net = policy_net(sharp=100, query=query)
        swapped = x._replace(query=x.query.flip(1))
        same = close(net(x, x.mask, 0, RATIO[:1]), net(swapped, x.mask, 0, RATIO[:1]))
        assert same is not matters


@pytest.mark.parametrize("query", ["tokens", "pooled", "none"])
def test_padding_of_tokens_and_words_does_not_matter(query: str) -> None:
    net = policy_net(sharp=100, query=query)
    batch = net(*_call(policy_input(TOKENS, WORDS, pad_v=5, pad_q=3)), 0, RATIO)
    for i in range(3):
        alone = net(
            *_call(policy_input(TOKENS[i : i + 1], WORDS[i : i + 1], seeds=[i])),
            0,
            RATIO[i : i + 1],
        )
        assert close((batch[0][i : i + 1, : TOKENS[i]], batch[1][i : i + 1]), alone)


def test_words_may_be_padded_on_either_side() -> None:
    net, x = policy_net(sharp=100), policy_input((9,), (4,), pad_q=3)
    left = x._replace(query=x.query.roll(3, 1), query_mask=x.query_mask.roll(3, 1))
    assert close(net(x, x.mask, 0, RATIO[:1]), net(left, x.mask, 0, RATIO[:1]))


def test_permuting_the_batch_permutes_the_result() -> None:
    net, x, order = policy_net(sharp=100), policy_input(TOKENS, WORDS), torch.tensor([2, 0, 1])
    logits, value = net(x, x.mask, 0, RATIO)
    assert close(net(x.rows(order), x.mask[order], 0, RATIO[order]), (logits[order], value[order]))


def test_step_ratio_and_position_are_inputs() -> None:
    net, x = policy_net(sharp=100), policy_input(TOKENS, WORDS)
    reference = net(x, x.mask, 0, RATIO)[0]
    assert not torch.allclose(net(x, x.mask, 1, RATIO)[0], reference, atol=1e-4)
    assert not torch.allclose(net(x, x.mask, 0, RATIO / 2)[0], reference, atol=1e-4)
    moved = x._replace(xy=x.xy.flip(2))
    assert not torch.allclose(net(moved, x.mask, 0, RATIO)[0], reference, atol=1e-4)
    blind = policy_net(sharp=100, positions=False)
    assert torch.equal(blind(moved, x.mask, 0, RATIO)[0], blind(x, x.mask, 0, RATIO)[0])


def test_the_same_numbers_with_and_without_grad_and_in_either_mode() -> None:
    net, x = policy_net(sharp=100), policy_input(TOKENS, WORDS)
    with_grad = net.train()(x, x.mask, 0, RATIO)
    with torch.no_grad():
        without = net.eval()(x, x.mask, 0, RATIO)
    assert torch.equal(with_grad[0], without[0])
    assert torch.equal(with_grad[1], without[1])


@pytest.mark.parametrize("query", ["tokens", "pooled", "none"])
def test_a_sample_without_image_or_question_gives_finite_numbers_and_gradients(query: str) -> None:
    net, x = policy_net(query=query), policy_input((5, 5), (3, 3))
    empty = torch.tensor([False, True])[:, None]
    x = x._replace(mask=x.mask & empty, query_mask=x.query_mask & empty)
    logits, value = net(x, x.mask, 0, torch.tensor([0.5, 0.5]))
    (logits.square().sum() + value.square().sum()).backward()
    assert bool(value.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_every_parameter_gets_a_gradient() -> None:
    net, x = policy_net(), policy_input(TOKENS, WORDS)
    logits, value = net(x, x.mask, 0, RATIO)
    (logits.square().sum() + value.square().sum()).backward()
    assert [
        name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())
    ] == []


def test_bad_sizes_are_one_sentence() -> None:
    with pytest.raises(
        UserError, match=r"policy\.width must be a multiple of policy\.heads=4, got 30"
    ):
        PolicyNet(4, 4, width=30, heads=4)
    with pytest.raises(UserError, match=r"policy\.query must be tokens, pooled or none, got words"):
        policy_net(query="words")
    x = policy_input((5,), (3,))
    with pytest.raises(UserError, match=r"step 3 is beyond policy\.max_steps=3"):
        policy_net()(x, x.mask, 3, RATIO[:1])


def _call(x: PolicyInput) -> tuple[PolicyInput, torch.Tensor]:
    return x, x.mask


def test_a_trace_holds_neither_counts_nor_the_ratio() -> None:
    """What is exported to another engine serves any image, question and budget."""
    net = policy_net(sharp=100).eval().requires_grad_(False)

    class Pass(torch.nn.Module):
        def forward(self, codes, xy, query, ratio):  # type: ignore[no-untyped-def]
            seen, read = torch.ones_like(codes[..., 0]) > 0, torch.ones_like(query[..., 0]) > 0
            return net(PolicyInput(codes, xy, seen, query, read), seen, 0, ratio)[0]

    def inputs(tokens: int, words: int, ratio: float) -> tuple[torch.Tensor, ...]:
        x = policy_input((tokens,), (words,))
        return x.codes, x.xy, x.query, torch.tensor([ratio])

    traced = torch.jit.trace(Pass(), inputs(9, 4, 0.3), check_trace=False)
    for sizes in ((9, 4, 0.3), (14, 2, 0.5), (6, 7, 1.0)):
        assert torch.allclose(traced(*inputs(*sizes)), Pass()(*inputs(*sizes)), atol=1e-6)
