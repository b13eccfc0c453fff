"""The questions that stages which learn from the LVLM read, iteration by iteration."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tprl.data.base import BaseDataset
from tprl.data.taking import nothing_left, taken
from tprl.errors import UserError
from tprl.runtime import distributed
from tprl.scoring.ahead import Ready, ahead
from tprl.types import LVLM, Sample


def drawn_ratios(
    ratios: Sequence[float], samples: Sequence[Sample], seed: int, iteration: int
) -> Float64[Tensor, " B"]:
    """One of `ratios` for each question, from (seed, iteration, uid) alone."""
    # A generator per question: neither batches, nor ranks, nor a resume change what one draws.
    draws = [random.Random(f"{seed}/{iteration}/{sample.uid}").choice(ratios) for sample in samples]
    return torch.tensor(draws, dtype=torch.float64)


class PreparedPrompts(IterableDataset[Ready]):
    """Batches of a `PromptStream`, prepared for an LVLM while it works on those before."""

    def __init__(self, lvlm: LVLM, stream: "PromptStream") -> None:
        self.lvlm, self.stream = lvlm, stream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Ready]:
        # Lazy: a batch is drawn when a thread is free to prepare it, not all of them at once.
        return ahead(self.lvlm, map(Ready, self.stream))

    def loader(self) -> DataLoader[Ready]:
        """As stages hand it to Lightning; the default one would rebuild every batch."""
        return DataLoader(self, batch_size=None, collate_fn=lambda batch: batch)


def prompt_loader(
    lvlm: LVLM, dataset: BaseDataset, hparams: Mapping[str, Any], iteration: int
) -> DataLoader[Ready]:
    """The batches from `iteration` on, by the hyper-parameters `prompts`, `iterations` and
    `seed`."""
    stream = PromptStream(
        dataset, hparams["prompts"], iteration, hparams["iterations"], hparams["seed"]
    )
    return PreparedPrompts(lvlm, stream).loader()


def stepwise(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> OptimizerLRSchedulerConfig:
    """What Lightning wants of an optimizer whose rate is multiplied by `factor(step)` at every
    step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PromptStream(IterableDataset[list[Sample]]):
    """Batches of fresh questions: iteration i reads the next `prompts` entries of a seeded
    permutation, every rank the same number of them.

    Args:
        dataset: the training split.
        prompts: questions per iteration, of all ranks together.
        start, stop: iterations; a resumed run starts in the middle and sees the same questions.
        seed: of the permutation; each pass over the data has its own.

    Raises:
        UserError: the ranks' shares would differ.
    """

    def __init__(
        self, dataset: BaseDataset, prompts: int, start: int, stop: int, seed: int = 0
    ) -> None:
        # Gradients are averaged over ranks, which is the mean over questions for equal shares only.
        if prompts % distributed.count():
            raise UserError(
                f"stage.prompts={prompts} are the questions of all ranks "
                f"together, and {distributed.count()} ranks cannot share "
                f"them equally: set a multiple of {distributed.count()}."
            )
        self.dataset, self.prompts, self.seed = dataset, prompts, seed
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        """Iterations of the whole run: a resumed Trainer counts those done before as well."""
        return self.stop

    def __iter__(self) -> Iterator[list[Sample]]:
        size = len(self.dataset)
        passes: tuple[int, Tensor] = (-1, torch.empty(0))
        for iteration in range(self.start, self.stop):
            samples = []
            for slot in distributed.share(range(self.prompts)):
                # Which pass over the data, and where in it; each pass has its own permutation.
                number, at = divmod(iteration * self.prompts + slot, size)
                if passes[0] != number:
                    order = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                    passes = (number, torch.randperm(size, generator=order))
                samples.append(self._sample(passes[1], at))
            yield samples

    def _sample(self, order: Tensor, at: int) -> Sample:
        """Entry `at` of the order; in place of a damaged row the next one that is not."""
        # In its place alone: a damaged row moves no other question, and ranks stay in step.
        following = (int(order[(at + step) % len(order)]) for step in range(len(order)))
        sample = next(taken(self.dataset, following), None)
        if sample is None:
            raise nothing_left(self.dataset, len(order), "to train on")
        return sample
