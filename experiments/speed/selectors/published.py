"""The selection rules as they are published, one sample at a time with tensor operations inside:
what ours is timed against. Written from the rules (docs/baselines.md), in float32 where theirs is
the model's dtype, which no CPU multiplies fast. Each takes the tokens of one image and returns the
indices it keeps, sorted.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def divprune(tokens: Tensor, keep: int) -> Tensor:
    """Max-min distance: every step looks again at the rows of all tokens that were chosen
    before."""
    unit = normalize(tokens, dim=1)
    distance = 1 - unit @ unit.T
    chosen = distance.topk(2, dim=0, largest=False).values[1].argmax().view(1)
    while len(chosen) < keep:
        nearest = distance.index_select(0, chosen).amin(0)
        chosen = torch.cat([chosen, nearest.argmax().view(1)])
    return chosen.sort().values


def cdpruner(tokens: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Greedy MAP of a DPP by incremental Cholesky factors."""
    unit = normalize(tokens, dim=1)
    q = -relevance
    q = (q - q.min() + 1e-6) / (q.max() - q.min())
    kernel = q.unsqueeze(1) * (unit @ unit.T) * q
    gain, factors = kernel.diagonal().clone(), kernel.new_zeros(keep, len(tokens))
    chosen = torch.empty(keep, dtype=torch.long, device=tokens.device)
    for step in range(keep):
        j = gain.argmax()
        row = kernel[j] - torch.einsum("s,sn->n", factors[:step, j], factors[:step])
        factors[step] = row / gain[j].sqrt()
        gain -= factors[step].square()
        gain[j] = -torch.inf
        chosen[step] = j
    return chosen.sort().values


def vispruner(features: Tensor, attention: Tensor, keep: int, drop: int = 8) -> Tensor:
    """Half by attention; then rounds that drop up to 8 of the even half, each with similarities
    computed anew."""
    important = keep // 2
    order = attention.argsort(descending=True)
    first, pool, goal = order[:important], order[important:], keep - important
    unit = normalize(features, dim=1)
    while (lose := min(drop, len(pool) - goal)) > 0:
        even, odd = pool[0::2], pool[1::2]
        similar = (unit[even] @ unit[odd].T).amax(1)
        pool = torch.cat([even[similar.argsort(descending=True)[lose:]], odd])
    return torch.cat([first, pool]).sort().values
