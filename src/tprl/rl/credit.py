"""Credit finer than the set: which tokens of a good episode its reward came from.

One reward for k tokens says the same of all of them, and the k - 1 that did not matter are noise
that grows with k. The best episode of each question is therefore read again several times, each
time without one block of its tokens. What a block's absence costs is its credit (difference
rewards, Wolpert and Tumer 2002), and the episode's advantage is shared out in proportion, so that
its sum over the tokens stays what it was.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def best_episodes(returns: Float[Tensor, " B"], group: int) -> Int[Tensor, " P"]:
    """Index of the episode with the highest return of each question; the first of equals.

    `group` consecutive episodes are about one question.
    """
    best = returns.reshape(-1, group).argmax(1)
    return best + group * torch.arange(len(best), device=returns.device)


def blocks_of(order: Int[Tensor, "P V"], blocks: int) -> Int[Tensor, "P V"]:
    """Block of each kept token, from 0 on, by its place in the order of drawing; -1 where it was
    not kept.

    Places are dealt out in turn, so that blocks differ by one token at most.
    """
    return torch.where(order > 0, (order - 1) % blocks, -1)


def without_blocks(
    block: Int[Tensor, "P V"], blocks: int, image: Int[Tensor, "P V"]
) -> Bool[Tensor, "N V"]:
    """The kept sets less one block each: N = P * blocks, those of a question follow each other.

    An image that would be left without any token keeps them all: every image keeps one at least.
    """
    # [P M V] the kept sets, each without one block.
    number = torch.arange(blocks, device=block.device).view(1, -1, 1)
    kept = (block >= 0).unsqueeze(1).expand(-1, blocks, -1)
    less = kept & (block.unsqueeze(1) != number)
    # How many tokens every image would keep.
    of_image = image.unsqueeze(1).expand_as(less)
    left = torch.zeros_like(less, dtype=torch.long).scatter_add(2, of_image, less.long())
    # An image without any token would be another question: it keeps what it had.
    emptied = left.gather(2, of_image) == 0
    return (less | (kept & emptied)).flatten(0, 1)


def shared_out(
    advantage: Float[Tensor, " P"], loss: Float[Tensor, "P M"], block: Int[Tensor, "P V"]
) -> Float[Tensor, "P V"]:
    """Each episode's advantage, token by token, in proportion to what the absence of the token's
    block costs.

    Args:
        advantage: of the whole episode.
        loss: return of the episode minus its return without each of M blocks; a gain counts as 0.
            Where no block costs anything, all tokens have the episode's advantage.
        block: see `blocks_of`; tokens in none get 0.
    """
    # [P M] what the absence of a block costs; a block whose absence helps gets nothing.
    cost = loss.clamp(min=0)
    total = cost.sum(1, keepdim=True)
    # [P M] how many tokens a block holds: credit is per token.
    members = torch.stack([(block == number).sum(1) for number in range(loss.shape[1])], 1)
    # Weights whose mean over the episode's tokens is 1.
    spent = (cost * members).sum(1, keepdim=True).clamp(min=1e-12)
    weight = cost * members.sum(1, keepdim=True) / spent
    weight = torch.where(total > 1e-6, weight, 1.0)
    # [P V] by token; those in no block get 0.
    each = weight.gather(1, block.clamp(min=0))
    return advantage.unsqueeze(1) * each * (block >= 0)
