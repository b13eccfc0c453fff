"""What a client sends instead of images."""

import base64
import io
import logging

import numpy as np
import pytest
import torch

import tprl
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.serving import embeds
from tprl.serving.embeds import message, pruned_embeds


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


def test_they_are_what_prune_keeps(lvlm: FrozenLVLM, caplog: pytest.LogCaptureFixture) -> None:
    data = Scenes("test")
    samples = [data[0], data[6]]
    texts, images = (
        [lvlm.render(sample) for sample in samples],
        [list(sample.images) for sample in samples],
    )
    inputs = lvlm.processor(text=texts, images=images, padding=True, return_tensors="pt")
    embeds._said.clear()
    with caplog.at_level(logging.WARNING):
        kept = pruned_embeds(lvlm.model, "tprl", 1 / 9, inputs, lvlm.processor)
        pruned_embeds(lvlm.model, "divprune", 1 / 9, inputs, lvlm.processor)
    assert caplog.text.count("positions are compact in what an engine makes of embeddings") == 1
    assert not hasattr(lvlm.model.generate, "undo")

    encoded = lvlm.encode(samples)
    with tprl.prune(lvlm.model, "tprl", 1 / 9, processor=lvlm.processor) as pruning:
        lvlm.model.generate(**inputs, max_new_tokens=1)
    for row, ((image,), (part,)) in enumerate(zip(pruning.kept, kept, strict=True)):
        assert torch.equal(part, encoded.visual[row, image.indices])


def test_a_message_holds_them_without_pickle() -> None:
    image = torch.randn(3, 4)
    turn = message("what is it?", [image])
    part, text = turn["content"]
    read = np.load(io.BytesIO(base64.b64decode(part["image_embeds"])), allow_pickle=False)
    assert np.array_equal(read, image.numpy())
    assert (turn["role"], part["type"], text) == (
        "user",
        "image_embeds",
        {"type": "text", "text": "what is it?"},
    )


@pytest.mark.parametrize(
    ("pruner", "ratio", "sentence"),
    [
        ("tprl_adaptive", 0.2, "gives every question its own budget"),
        ("fastv", 0.6, "between layers"),
    ],
)
def test_pruners_that_cannot_be_served(
    lvlm: FrozenLVLM, pruner: str, ratio: float, sentence: str
) -> None:
    inputs = lvlm.processor(
        text="USER: <image> ASSISTANT:", images=Scenes("test")[0].images[0], return_tensors="pt"
    )
    with pytest.raises(UserError, match=sentence):
        pruned_embeds(lvlm.model, pruner, ratio, inputs, lvlm.processor)
    assert not hasattr(lvlm.model.generate, "undo")
