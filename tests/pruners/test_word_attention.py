"""Word attention x DPP against attention_dpp on the same numbers."""

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.lvlm.llava import Llava
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.word_attention import WordAttentionPruner


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("ratio", [1 / 3, 1 / 18])
def test_it_is_the_rule_of_attention_dpp_on_attention_to_words(ratio: float, alpha: float) -> None:
    encoded = toy_encoded(extras=["cls_attention"])
    expected = AttentionDPPPruner(alpha).select(encoded, ratio).keep
    encoded.extras["word_attention"] = encoded.extras.pop("cls_attention")
    assert torch.equal(WordAttentionPruner(alpha).select(encoded, ratio).keep, expected)


def test_its_flops_are_those_of_the_early_layers_and_the_dpp() -> None:
    shape = Llava("tiny_llava", device="cpu").shape
    dpp = AttentionDPPPruner().flops(shape, 144, 16)
    lm = shape.lm
    # Projections of queries, keys, values and output, attention, and a gated MLP, in each layer.
    kv = lm.kv_heads * lm.head_dim
    q = lm.heads * lm.head_dim
    layer = 2 * 144 * (2 * lm.width * q + 2 * lm.width * kv + 3 * lm.width * lm.ffn)
    layer += 4 * 144**2 * q
    assert WordAttentionPruner().flops(shape, 144, 16) == dpp + round(0.4 * lm.layers) * layer
