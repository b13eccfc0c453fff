"""`OfficialScore`: numbers over images, from one process or two, and their intervals."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tprl.errors import UserError
from tprl.evaluation.official import OfficialScore
from tprl.types import Sample


class Pairs:
    """Accuracy over questions, and over images whose questions are all right."""

    protocol, headline, answer_tokens = "pairs", "accuracy", 1

    def facts(self, sample: Sample, prediction: str) -> Sequence[float]:
        return (float(prediction == sample.answers[0]), 1.0)

    def per_image(self, facts: Tensor) -> Tensor:
        return torch.tensor([*facts.sum(0), facts[:, 0].prod(), 1.0], dtype=torch.float64)

    def official(self, total: Tensor) -> dict[str, Tensor]:
        return {
            "accuracy": 100 * total[..., 0] / total[..., 1],
            "both": 100 * total[..., 2] / total[..., 3],
        }


UIDS = ["p/a/1", "p/a/2", "p/b/1", "p/b/2", "p/c/1", "p/c/2"]
RIGHT = [1, 1, 1, 0, 0, 0]  # 3 of 6 questions, 1 of 3 images


def options(order: Sequence[int]) -> OfficialScore:
    metric = OfficialScore(Pairs())
    for i in order:
        metric.update([UIDS[i]], [(float(RIGHT[i]), 1.0)])
    return metric


def plain(numbers: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in numbers.items()}


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3], [0, 1, 2, 3, 4, 5, 0, 3, 3]]
)
def test_neither_order_nor_repetition_changes_the_numbers(order: list[int]) -> None:
    assert plain(options(order).compute()) == {"accuracy": 50.0, "both": 33.3333}


def test_an_image_counts_whole_though_its_questions_come_in_different_batches() -> None:
    metric = options([0, 2, 4])
    assert plain(metric.compute()) == {"accuracy": 66.6667, "both": 66.6667}
    metric.update([UIDS[i] for i in (1, 3, 5)], [(float(RIGHT[i]), 1.0) for i in (1, 3, 5)])
    assert plain(metric.compute()) == {"accuracy": 50.0, "both": 33.3333}
    metric.reset()
    metric.update(UIDS[4:], [(0.0, 1.0)] * 2)
    assert plain(metric.compute()) == {"accuracy": 0.0, "both": 0.0}


def test_intervals_resample_images() -> None:
    numbers = options(range(6)).intervals()
    assert {name: round(item.mean, 4) for name, item in numbers.items()} == {
        "accuracy": 50.0,
        "both": 33.3333,
    }
    # 1 of 27 draws shows only the wrong image, 1 of 27 only the right one: more than the 2.5 % on
    # either side.
    assert (numbers["accuracy"].low, numbers["accuracy"].high) == (0.0, 100.0)
    assert options([5, 4, 3, 2, 1, 0]).intervals() == numbers
    alone = options([0, 1]).intervals()["both"]
    assert alone.mean == 100.0
    assert alone.low != alone.low  # nan: one image leaves nothing to resample


def test_without_answers_there_is_no_score() -> None:
    metric = OfficialScore(Pairs())
    with pytest.raises(UserError, match="no question was answered"):
        metric.compute()
    metric.update([], [])
    with pytest.raises(UserError, match="no question was answered"):
        metric.compute()
    with pytest.raises(ValueError, match="2 questions with facts of 1 answers"):
        metric.update(["a", "b"], [(1.0, 1.0)])


def test_a_group_that_few_images_have_keeps_its_interval() -> None:
    class Rare(Pairs):
        def official(self, total: Tensor) -> dict[str, Tensor]:
            return {"rare": total[..., 0] / total[..., 1]}

        def per_image(self, facts: Tensor) -> Tensor:
            return facts.sum(0)

    metric = OfficialScore(Rare())
    metric.update(
        [f"p/{i}/0" for i in range(200)], [(float(i == 0), float(i < 2)) for i in range(200)]
    )
    numbers = metric.intervals()["rare"]
    assert (numbers.mean, numbers.low, numbers.high) == (0.5, 0.0, 1.0)


def _process(rank: int, parts: Sequence[Sequence[int]], port: int, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    queue.put(plain(options(parts[rank]).compute()))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "parts",
    [([0, 3, 4], [1, 2, 3, 5]), ([0, 1, 2, 3, 4, 5], [])],
    ids=["images divided, a question answered twice", "one has nothing to do"],
)
def test_two_processes_give_the_numbers_of_one(parts: Sequence[Sequence[int]]) -> None:
    context = mp.get_context("fork")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_process, args=(rank, parts, port, queue)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    numbers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert numbers == [{"accuracy": 50.0, "both": 33.3333}] * 2
