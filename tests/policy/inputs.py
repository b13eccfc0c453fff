"""Synthetic policy inputs; the content of a sample depends on its seed and its counts only, never
on the batch."""

import itertools
from collections.abc import Sequence

import torch

from tprl.policy.dpp import unit_features
from tprl.policy.networks import PolicyInput, PolicyNet

Z, D = 10, 12  # widths of codes and query


def policy_input(
    tokens: Sequence[int],
    words: Sequence[int],
    seeds: Sequence[int] | None = None,
    pad_v: int = 0,
    pad_q: int = 0,
) -> PolicyInput:
    """`tokens[b]` visual tokens and `words[b]` query tokens per sample, right-padded with
    garbage."""
    b, v, q = len(tokens), max(tokens) + pad_v, max(words) + pad_q
    codes, xy, query = (
        torch.full((b, v, Z), 7e3),
        torch.full((b, v, 2), 0.3),
        torch.full((b, q, D), -5e3),
    )
    for i, seed in enumerate(seeds or range(b)):
        generator = torch.Generator().manual_seed(seed)
        codes[i, : tokens[i]] = torch.randn(tokens[i], Z, generator=generator)
        xy[i, : tokens[i]] = torch.rand(tokens[i], 2, generator=generator)
        query[i, : words[i]] = torch.randn(words[i], D, generator=generator)
    mask = torch.arange(v) < torch.tensor(tokens)[:, None]
    query_mask = torch.arange(q) < torch.tensor(words)[:, None]
    return PolicyInput(codes, xy, mask, query, query_mask, unit_features(codes, mask))


def policy_net(sharp: float = 1.0, **options: object) -> PolicyNet:
    """A small network; `sharp` > 1 scales the policy head, so that logits are far from 0."""
    torch.manual_seed(0)
    net = PolicyNet(Z, D, width=32, heads=4, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        net.policy_head.out.weight.mul_(sharp)
    return net


def subsets(n: int, k: int) -> torch.Tensor:
    """All k-subsets of n items as masks [C n]."""
    rows = [[i in chosen for i in range(n)] for chosen in itertools.combinations(range(n), k)]
    return torch.tensor(rows)


def features(tokens: Sequence[int]) -> torch.Tensor:
    """Unit features of random tokens."""
    result = policy_input(tokens, [1] * len(tokens)).features
    assert result is not None
    return result
