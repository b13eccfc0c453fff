"""Every family on one GPU and cut over two, emulated: nothing mixes devices, and results are those of the CPU."""

from typing import Any

import pytest
import torch
from tests.devices import HOST, Machine, cut, device_of, place, put
from tests.lvlm.small import families
from tests.lvlm.test_families import SAMPLES
from torch import Tensor, nn

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerStage
from tprl.splice import keep_all, splice

ANSWERS = ["red", "yes it is"]
MERGING = ("visionzip", "prumerge", "tome")  # what they merge goes through the projector again
CUT = pytest.mark.filterwarnings("ignore:The following device_map keys")  # a lone parameter is no module


def small(name: str) -> FrozenLVLM:
    return load_component("model", name, pretrained=None, dtype="float32", max_new_tokens=2)


def score(lvlm: FrozenLVLM, pruner: str, keep_ratio: float = 0.4) -> Tensor:
    """Likelihood of the answers after a pruner that works before the language model."""
    component = load_component("pruner", pruner)
    encoded = lvlm.encode(SAMPLES[:2], component.extras)
    return lvlm.score(splice(encoded, component.select(encoded, keep_ratio)), ANSWERS)[0]


def score_inside(lvlm: FrozenLVLM, pruner: str) -> Tensor:
    """The same after one that drops tokens before the last layer, by what the layer before it computed."""
    encoded = lvlm.encode(SAMPLES[:2])
    stages = (LayerStage(lvlm.layers - 1, lvlm.layers - 2, 0.4),)
    plan = LayerPlan(load_component("pruner", pruner), stages, lvlm.layers)
    return lvlm.score(splice(encoded, keep_all(encoded)), ANSWERS, plan)[0]


def everything(lvlm: FrozenLVLM) -> dict[str, Any]:
    """What a model does, once each; numbers are back on the host."""
    encoded = lvlm.encode(SAMPLES[:2], lvlm.known_extras - lvlm.related)
    prompt = splice(encoded, keep_all(encoded))
    gate = torch.linspace(0.2, 1, encoded.visual_mask.shape[1], device=lvlm.device).repeat(2, 1).requires_grad_()
    lvlm.gated_log_prob(encoded, gate, ANSWERS).sum().backward()
    assert gate.grad is not None
    results = {f"extra {name}": value for name, value in encoded.extras.items()}
    results |= {"embeds": encoded.embeds, "gates": gate.grad}
    results |= {"outside": score(lvlm, "divprune"), "inside": score_inside(lvlm, "dart")}
    assert {place(value) for value in results.values()} == {lvlm.device}
    return {name: value.cpu() for name, value in results.items()} | {"text": lvlm.answer(prompt)}


def same(results: dict[str, Any], expected: dict[str, Any]) -> None:
    assert results.pop("text") == expected.pop("text")
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


@CUT
@pytest.mark.parametrize("name", families())
def test_a_family_on_one_device_and_on_two(name: str) -> None:
    lvlm = small(name)
    expected = everything(lvlm)
    for count in (1, 2):
        with Machine():
            cut(lvlm, count)
            results = everything(lvlm)
        same(results, dict(expected))
