"""How often the host waits for the device: a GPU stands still meanwhile."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lvlm.small import SAMPLES
from torch.overrides import TorchFunctionMode

from tprl.lvlm.llava import Llava
from tprl.splice import keep_all, splice
from tprl.types import Encoded

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero"}


class Waits(TorchFunctionMode):
    """Counts the calls that read numbers of a tensor: of one on a GPU each of them waits."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def waits(work: Callable[[], Any]) -> int:
    with Waits() as counter:
        work()
    return counter.calls.total()


@pytest.mark.parametrize("method", ["score", "answer"])
def test_of_a_micro_batch_do_not_depend_on_the_number_of_prompts(
    method: str, lvlm: Llava, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvlm, "micro_batch", 64)
    monkeypatch.setattr(lvlm, "max_new_tokens", 1)

    def work(count: int) -> Callable[[], Any]:
        part = encoded.rows(range(count))
        prompt, answers = splice(part, keep_all(part)), ["red"] * count
        return (
            (lambda: lvlm.score(prompt, answers))
            if method == "score"
            else (lambda: lvlm.answer(prompt))
        )

    work(2)()  # what is done once is done
    assert waits(work(12)) == waits(work(2)) <= 12


def test_of_several_micro_batches_are_a_few_each(
    lvlm: Llava, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = splice(encoded.rows(range(12)), keep_all(encoded.rows(range(12))))
    counts = []
    for size in (12, 3):
        monkeypatch.setattr(lvlm, "micro_batch", size)
        counts.append(waits(lambda: lvlm.score(prompt, ["red"] * 12)))
    # ours and the stock class's look at the mask, once per forward
    assert counts[1] - counts[0] <= 3 * 2


def test_of_encoding_do_not_depend_on_the_number_of_samples(lvlm: Llava) -> None:
    lvlm.encode(SAMPLES[:2])
    batches = [parts(lvlm, count) for count in (2, 12)]
    few, many = (waits(lambda batch=batch: lvlm._assemble(*batch)) for batch in batches)
    assert few == many


def parts(lvlm: Llava, count: int) -> Any:
    """What `_assemble` gets of so many samples."""
    calls: list[Any] = []
    stock = lvlm._assemble
    lvlm._assemble = lambda *args: calls.append(args) or stock(*args)  # type: ignore[method-assign]
    try:
        lvlm.encode(SAMPLES[:count])
    finally:
        del lvlm._assemble
    return calls[0]


def test_the_counter_counts() -> None:
    assert waits(lambda: [bool(row.any()) for row in torch.ones(5, 2)]) == 5
