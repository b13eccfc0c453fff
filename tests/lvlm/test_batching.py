"""Where memory ends, smaller micro-batches give the same answers."""

import logging
from typing import Any

import pytest
import torch

from tprl.data.scenes import Scenes
from tprl.data.taking import take
from tprl.errors import UserError
from tprl.lvlm.llava import Llava
from tprl.splice import keep_all, splice


def fits(lvlm: Llava, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the language model has memory for so many prompts."""
    forward = lvlm.model.forward

    def limited(*args: Any, **inputs: Any) -> Any:
        if (
            len(
                inputs["inputs_embeds"]
                if inputs.get("inputs_embeds") is not None
                else inputs["input_ids"]
            )
            > rows
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return forward(*args, **inputs)

    monkeypatch.setattr(lvlm.model, "forward", limited)


def test_the_micro_batch_is_halved_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lvlm, samples = Llava("tiny_llava", device="cpu"), take(Scenes("test"), range(7))
    encoded = lvlm.encode(samples)
    prompt, answers = splice(encoded, keep_all(encoded)), [sample.answers[0] for sample in samples]
    scored, texts = lvlm.score(prompt, answers), lvlm.answer(prompt)
    fits(lvlm, 2, monkeypatch)
    with caplog.at_level(logging.WARNING):
        again = lvlm.score(prompt, answers)
    assert lvlm.micro_batch == 2
    ours = [record.message for record in caplog.records if record.name.startswith("tprl")]
    assert ours == [
        "out of memory with 7 prompts: from here on micro-batches of 4",
        "out of memory with 4 prompts: from here on micro-batches of 2",
    ]
    torch.testing.assert_close(again[0], scored[0], atol=1e-5, rtol=0)
    assert torch.equal(again[1], scored[1])
    assert lvlm.answer(prompt) == texts


def test_no_memory_for_a_single_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, samples = Llava("tiny_llava", device="cpu"), take(Scenes("test"), range(2))
    encoded = lvlm.encode(samples)
    fits(lvlm, 0, monkeypatch)
    with pytest.raises(
        UserError, match=r"has no memory for a single prompt of \d+ tokens: use model\.load_in=4bit"
    ):
        lvlm.answer(splice(encoded, keep_all(encoded)))
