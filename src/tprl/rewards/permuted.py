"""The control of RL: the right rewards, given to the wrong episodes of the same question."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tprl.errors import UserError
from tprl.rewards import WeightedReward
from tprl.types import Outcome


class Permuted(WeightedReward):
    """A reward whose episodes are permuted at random within each question, all terms and steps of
    one together.

    Level and spread of the rewards of every question stay, what they say about an action is gone:
    PPO must stay where it started. What it gains all the same is the gain of choosing the best
    checkpoint, not of learning. Permutations are uniform (an episode may get its own reward), so
    the expected leave-one-out advantage of every action is 0.

    Source: ours. The permutation depends on (seed, uid, the question's rewards in ascending order)
    only: nothing has to be remembered when a run is resumed, and the order of the episodes plays no
    part.

    Args:
        terms: as for `WeightedReward`.
        seed: of the permutations.
    """

    def __init__(self, terms: Mapping[str, Any] | Sequence[Any], seed: int = 0) -> None:
        super().__init__(terms)
        self.seed = seed

    def __call__(self, outcome: Outcome) -> dict[str, Float[Tensor, "T B"]]:
        """The permuted terms.

        Raises:
            UserError: a question with one episode, whose reward nothing could be exchanged with.
        """
        terms = super().__call__(outcome)
        # Rows of each question; an exchange never leaves its question.
        episodes = dict[str, list[int]]()
        for row, uid in enumerate(outcome.uids):
            episodes.setdefault(uid, []).append(row)
        lonely = next((uid for uid, rows in episodes.items() if len(rows) < 2), None)
        if lonely is not None:
            raise UserError(
                "reward=permuted exchanges rewards between episodes of one "
                f"question, and {lonely} has one: set stage.group=8 or more."
            )
        # One permutation for all terms and steps: an episode's rewards move as a whole.
        total = torch.stack(list(terms.values())).sum((0, 1)).double().cpu()
        order = torch.arange(len(outcome.uids))
        for uid, rows in episodes.items():
            order[rows] = order[rows][self._permutation(uid, total[rows])]
        return {name: value[:, order.to(value.device)] for name, value in terms.items()}

    def _permutation(self, uid: str, rewards: Float[Tensor, " G"]) -> Int[Tensor, " G"]:
        # Sorted, so that the order in which episodes come plays no part.
        values = rewards.sort().values.numpy().tobytes()
        digest = hashlib.blake2b(f"{self.seed}/{uid}/".encode() + values, digest_size=7).digest()
        # 7 bytes: the seed fits into a signed 64-bit integer.
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return torch.randperm(len(rewards), generator=generator)
