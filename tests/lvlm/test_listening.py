"""The attention of the question's words in an early layer, against what the stock eager attention
used."""

from typing import Any

import pytest
import torch
from tests.lvlm.test_extras import SAMPLES, make

from tprl.lvlm.batching import axes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.listening import WORD_ATTENTION, listening_layer
from tprl.splice import keep_all, splice
from tprl.types import Encoded

EXTRA = frozenset({WORD_ATTENTION})
FAMILIES = [
    "llava",
    "qwen3_vl",  # deepstack
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "internvl3")),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("smolvlm2", "llava_next")),
]


def weights_of(lvlm: FrozenLVLM, encoded: Encoded, number: int) -> torch.Tensor:
    """[B H S S] what layer `number` of the stock eager model weighs the unpruned prompt with."""
    prompt = splice(encoded, keep_all(encoded))
    with torch.no_grad(), lvlm.deepstack(prompt.deep, prompt.visual):
        out: Any = lvlm.model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention.long(),
            position_ids=axes(prompt.positions),
            output_attentions=True,
            use_cache=False,
        )
    return out.attentions[number]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_mean_over_heads_and_words_of_the_stock_attention(name: str) -> None:
    encoded = make(name).encode(SAMPLES, EXTRA)
    eager = make(name, attention="eager")
    number = listening_layer(eager.layers)
    if encoded.deep is not None:
        number = max(number, encoded.deep.shape[-1] // encoded.embeds.shape[-1])
    weights = weights_of(eager, encoded, number).mean(1)
    for b in range(len(SAMPLES)):
        words = weights[b][encoded.question[b]].mean(0)
        expected = words[encoded.visual_at[b]] * encoded.visual_mask[b]
        assert torch.allclose(encoded.extras[WORD_ATTENTION][b], expected, atol=1e-5)
    assert encoded.extras[WORD_ATTENTION].sum() > 0


def test_a_prompt_hears_the_same_alone_and_later_layers_do_not_run() -> None:
    lvlm = make("llava")
    ran: list[int] = []
    layers = lvlm.model.model.language_model.layers
    handles = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(layers)
    ]
    together = lvlm.encode(SAMPLES, EXTRA).extras[WORD_ATTENTION]
    for handle in handles:
        handle.remove()
    assert set(ran) == set(range(listening_layer(len(layers))))
    for b, sample in enumerate(SAMPLES):
        alone = lvlm.encode([sample], EXTRA).extras[WORD_ATTENTION][0]
        assert torch.allclose(alone, together[b, : len(alone)], atol=1e-6)


def test_without_words_it_is_zero() -> None:
    lvlm = make("llava")
    encoded = lvlm.encode(SAMPLES[:2])
    encoded.question[1] = False
    scores = lvlm.word_attention(encoded)
    assert scores[0].sum() > 0
    assert not scores[1].any()


@pytest.mark.parametrize(("layers", "number"), [(5, 2), (32, 13), (2, 1)])
def test_the_layer_is_at_two_fifths_of_the_depth(layers: int, number: int) -> None:
    assert listening_layer(layers) == number
