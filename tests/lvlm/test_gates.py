"""Gates on visual tokens: both ways to attend by them agree, and a graph holds what is forecast."""

import pytest
import torch
from tests.lvlm.small import SAMPLES
from torch import Tensor

from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.gates import graph_bytes
from tprl.lvlm.llava import Llava
from tprl.types import Encoded

ANSWERS = [sample.answers[0] for sample in SAMPLES]


def slope(lvlm: FrozenLVLM, encoded: Encoded) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probabilities, their gradient in the gates, and what the graph held beside weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in lvlm.model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            held[x.untyped_storage().data_ptr()] = x
        return x

    gate = torch.rand(encoded.visual_mask.shape, generator=torch.Generator().manual_seed(1))
    gate = (gate * encoded.visual_mask).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = lvlm.gated_log_prob(encoded, gate, ANSWERS)
    value.sum().backward()
    assert gate.grad is not None
    return value.detach(), gate.grad, list(held.values())


def test_gates_folded_into_keys_are_gates_in_a_mask(
    lvlm: Llava, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, gradient, held = slope(lvlm, encoded)
    with monkeypatch.context() as patch:
        patch.setattr(lvlm.model.config.text_config, "_attn_implementation", "eager")
        expected = slope(lvlm, encoded)
    torch.testing.assert_close(value, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, expected[1], atol=1e-5, rtol=1e-4)
    # Folded, no layer writes out every query times every key.
    square = (encoded.embeds.shape[1] + lvlm.answer_ids(ANSWERS).shape[1],) * 2
    assert not any(x.shape[-2:] == square for x in held)
    assert any(x.shape[-2:] == square for x in expected[2])


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_graph_holds_no_more_than_is_forecast(
    kind: str, encoded: Encoded, lvlm: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvlm.model.config.text_config, "_attn_implementation", kind)
    held = sum(x.untyped_storage().nbytes() for x in slope(lvlm, encoded)[2])
    length = encoded.embeds.shape[1] + lvlm.answer_ids(ANSWERS).shape[1]
    forecast = graph_bytes(lvlm.shape.lm, len(ANSWERS), length, folded=kind == "sdpa")
    assert forecast / 3 < held < forecast
    # Where that is more than there is, layers are computed again.
    monkeypatch.setattr(lvlm, "working_gib", 0.0)
    assert sum(x.untyped_storage().nbytes() for x in slope(lvlm, encoded)[2]) < held / 2
