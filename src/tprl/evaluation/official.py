"""The numbers that a benchmark publishes, as a torchmetrics metric with bootstrap intervals."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from tprl.errors import UserError
from tprl.evaluation.statistics import Interval, image_key, percentiles, resampled_sums
from tprl.types import Sample

# the states of the metric
DTYPES = {"question": torch.int64, "image": torch.int64, "values": torch.float64}


@runtime_checkable
class Published(Protocol):
    """A dataset with official numbers, see `benchmark.Benchmark`."""

    protocol: str
    headline: str
    answer_tokens: int

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]: ...

    def per_image(self, facts: Float[Tensor, "N F"]) -> Float[Tensor, " G"]: ...

    def official(self, total: Float[Tensor, "... G"]) -> dict[str, Float[Tensor, "..."]]: ...


class OfficialScore(Metric):
    """The official numbers of answers given so far.

    Distributed-safe: answers are gathered from all processes, and one that several processes gave
    (samplers repeat samples to fill the last batch) counts once. Facts stay per question, so
    numbers of whole images (MME's accuracy+) do not depend on which process answered.

    Args:
        dataset: says what the facts of an answer are and which numbers they make.
        options: of `torchmetrics.Metric`.
    """

    full_state_update = False
    question: Any  # lists of flat tensors until they are gathered
    image: Any
    values: Any

    def __init__(self, dataset: Published, **options: Any) -> None:
        super().__init__(**options)
        self.dataset = dataset
        for name in DTYPES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, uids: Sequence[str], facts: Sequence[Sequence[float]]) -> None:
        """Answers to the questions `uids`; `facts` are what `dataset.facts` made of them."""
        if len(uids) != len(facts):
            raise ValueError(
                f"{len(uids)} questions with facts of {len(facts)} answers: give one each."
            )
        # Texts cannot be gathered between processes: their hashes can.
        self.question.append(_keys(uids).to(self.device))
        self.image.append(_keys([image_key(uid) for uid in uids]).to(self.device))
        flat = list(chain.from_iterable(facts))
        self.values.append(torch.tensor(flat, dtype=torch.float64, device=self.device))

    def sync(self, *args: Any, **options: Any) -> None:
        """As of torchmetrics; a process without any answer takes part, which its empty lists would
        not."""
        for name, dtype in DTYPES.items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                getattr(self, name).append(torch.zeros(0, dtype=dtype, device=self.device))
        super().sync(*args, **options)

    def compute(self) -> dict[str, Tensor]:
        """The official numbers, in their published unit."""
        return self.dataset.official(self._images().sum(0))

    def intervals(
        self, level: float = 0.95, resamples: int = 4000, seed: int = 0
    ) -> dict[str, Interval]:
        """The same with cluster-bootstrap percentile intervals: images are drawn with
        replacement."""
        # [C G] facts of images, of which the official numbers are made draw by draw.
        images = self._images()
        point = self.dataset.official(images.sum(0))
        # One image says nothing of others.
        if len(images) < 2:
            return {
                name: Interval(float(value), float("nan"), float("nan"))
                for name, value in point.items()
            }
        drawn = self.dataset.official(
            torch.from_numpy(resampled_sums(images.cpu().numpy(), resamples, seed))
        )
        return {
            name: Interval(float(point[name]), *percentiles(drawn[name].numpy(), level))
            for name in point
        }

    def _images(self) -> Float[Tensor, "C G"]:
        """Facts of every image, in an order that depends on the answers alone."""
        question, image, values = (
            dim_zero_cat(state) if len(state := getattr(self, name)) else torch.zeros(0)
            for name in DTYPES
        )
        if not len(question):
            raise UserError(
                "no question was answered, so there is no official score: raise limit, or mend the "
                "damaged rows."
            )
        # Sorted by question, so that the first answer of several to one is kept.
        values = values.reshape(len(question), -1)
        order = question.argsort(stable=True)
        first = torch.ones_like(question, dtype=torch.bool)
        first[1:] = question[order].diff() != 0
        kept = order[first]
        image, values = image[kept], values[kept]
        # Then by image: one row of facts for each.
        by_image = image.argsort(stable=True)
        counts = image[by_image].unique_consecutive(return_counts=True)[1]
        return torch.stack(
            [self.dataset.per_image(part) for part in values[by_image].split(counts.tolist())]
        )


def _keys(texts: Sequence[str]) -> Int[Tensor, " N"]:
    """A number of 63 bits for each text, the same on every machine."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor(
        [int.from_bytes(digest, "big") >> 1 for digest in digests], dtype=torch.int64
    )
