"""Every family on one GPU and cut over two, emulated: nothing mixes devices, and results are those
of the CPU."""

from typing import Any

import pytest
import torch
from tests.devices import HOST, Machine, cut, device_of, place
from tests.lvlm.small import each_family
from tests.lvlm.test_families import SAMPLES
from torch import Tensor

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerStage
from tprl.splice import keep_all, splice
from tprl.types import Encoded

ANSWERS = ["red", "yes it is"]
MERGING = ("visionzip", "prumerge", "tome")  # what they merge goes through the projector again
# a lone parameter is no module
CUT = pytest.mark.filterwarnings("ignore:The following device_map keys")


def small(name: str) -> FrozenLVLM:
    return load_component("model", name, pretrained=None, dtype="float32", max_new_tokens=2)


def score(lvlm: FrozenLVLM, pruner: str, keep_ratio: float = 0.4) -> Tensor:
    """Likelihood of the answers after a pruner that works before the language model."""
    component = load_component("pruner", pruner)
    encoded = lvlm.encode(SAMPLES[:2], component.extras)
    return lvlm.score(splice(encoded, component.select(encoded, keep_ratio)), ANSWERS)[0]


def score_inside(lvlm: FrozenLVLM, pruner: str, before: int = 0) -> Tensor:
    """The same after one that drops tokens before the last layer, by what that layer reads, or one
    so much `before`."""
    encoded = lvlm.encode(SAMPLES[:2])
    last = lvlm.layers - 1
    plan = LayerPlan(
        load_component("pruner", pruner), (LayerStage(last, last - before, 0.4),), lvlm.layers
    )
    return lvlm.score(splice(encoded, keep_all(encoded)), ANSWERS, plan)[0]


def everything(lvlm: FrozenLVLM) -> dict[str, Any]:
    """What a model does, once each; numbers are back on the host."""
    encoded = lvlm.encode(SAMPLES[:2], lvlm.known_extras - lvlm.related)
    prompt = splice(encoded, keep_all(encoded))
    results = {f"extra {name}": value for name, value in encoded.extras.items()}
    results |= {"embeds": encoded.embeds, "outside": score(lvlm, "divprune")}
    if lvlm.definition == "masked":  # else refused
        results |= {"gates": gates(lvlm, encoded), "dart": score_inside(lvlm, "dart", before=1)}
        results |= {"pyramiddrop": score_inside(lvlm, "pyramiddrop")}
    assert {place(value) for value in results.values()} == {lvlm.device}
    return {name: value.cpu() for name, value in results.items()} | {"text": lvlm.answer(prompt)}


def gates(lvlm: FrozenLVLM, encoded: Encoded) -> Tensor:
    """The gradient of the answers' likelihood in gates on visual tokens."""
    gate = (
        torch.linspace(0.2, 1, encoded.visual_mask.shape[1], device=lvlm.device)
        .repeat(2, 1)
        .requires_grad_()
    )
    lvlm.gated_log_prob(encoded, gate, ANSWERS).sum().backward()
    assert gate.grad is not None
    return gate.grad


def differing(results: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    """Names of what only one of them holds, or of what is not equal up to rounding."""
    return results.keys() ^ expected.keys() | {
        name
        for name in results.keys() & expected.keys()
        if not equal(results[name], expected[name])
    }


def equal(value: Any, expected: Any) -> bool:
    if isinstance(value, Tensor):
        return torch.allclose(value, expected, atol=1e-6)
    return value == expected


@CUT
@pytest.mark.parametrize("name", each_family())
def test_a_family_on_one_device_and_on_two(name: str) -> None:
    lvlm = small(name)
    expected = everything(lvlm)
    # Gemma 4 compares prompts with embeddings of words, and says so where they are elsewhere.
    words = 0 if name == "gemma4" else 1
    for count in (1, 2):
        with Machine():
            cut(lvlm, count, words)
            results = everything(lvlm)
        assert "text" in results
        assert differing(results, expected) == set()


@CUT
@pytest.mark.parametrize("pruner", MERGING)
def test_merged_tokens_come_back_from_a_projector_elsewhere(pruner: str) -> None:
    lvlm = small("llava")
    expected = score(lvlm, pruner)
    with Machine():
        cut(lvlm, 2)
        assert lvlm.model.hf_device_map["model.multi_modal_projector.linear_1"] == 1
        assert torch.allclose(score(lvlm, pruner).cpu(), expected, atol=1e-6)


class TestMachine:
    """What the emulation refuses and counts is what a machine with GPUs would."""

    def test_tensors_of_two_devices_do_not_mix(self) -> None:
        with Machine():
            host, first, second = (torch.ones(3, device=name) for name in ("cpu", 0, "cuda:1"))
            for left, right in ((host, first), (first, second)):
                for mix in (
                    torch.add,
                    torch.maximum,
                    lambda a, b: torch.cat([a, b]),
                    lambda a, b: a * b,
                ):
                    with pytest.raises(
                        RuntimeError, match=r"on the same device, got (cpu|cuda:0), cuda:[01] in"
                    ):
                        mix(left, right)
            assert (first * torch.tensor(2.0)).device == first.device == device_of("cuda")

    def test_results_stay_and_copies_move(self) -> None:
        with Machine():
            x = torch.arange(6.0, device="cuda:1").view(2, 3)
            for y in (
                x.mT,
                x[0],
                x.new_zeros(2),
                torch.zeros_like(x),
                x.softmax(-1),
                x.half(),
                x.data,
            ):
                assert (y.device, y.is_cuda) == (device_of(1), True)
            assert [x.to(name).device for name in ("cpu", 0)] == [HOST, device_of(0)]
            assert x.to(torch.zeros(1, dtype=torch.half)).device == HOST
            assert torch.nn.Linear(3, 2).to("cuda:1")(x).device == x.device

    def test_an_index_comes_from_the_host_or_from_the_same_device(self) -> None:
        with Machine():
            x, index = torch.ones(3, device=0), torch.tensor([0, 2])
            assert x[index].device == x.device
            for tensor, at in ((x, index.to("cuda:1")), (x.cpu(), index.to("cuda:0"))):
                with pytest.raises(RuntimeError, match="in __getitem__"):
                    tensor[at]
            with pytest.raises(RuntimeError, match="in __setitem__"):
                x[index] = torch.ones(2)

    def test_results_of_vmap_are_where_its_operands_are(self) -> None:
        with Machine():
            x, y = torch.ones(3, device=1), torch.ones(2, device=1)
            grid = torch.vmap(torch.vmap(torch.add, (None, 0)), (0, None))(x, y)
            assert (grid.shape, grid.device) == ((3, 2), x.device)
            with pytest.raises(RuntimeError, match="on the same device, got cuda:0, cuda:1 in add"):
                torch.vmap(torch.add, (0, None))(x, torch.ones(2, device=0))

    def test_gradients_are_where_their_parameters_are(self) -> None:
        with Machine():
            layer = torch.nn.Linear(3, 2).to("cuda:1")
            layer(torch.ones(3, device="cuda:1")).sum().backward()
            assert layer.weight.grad is not None
            assert layer.weight.grad.device == device_of(1)

    def test_what_waits_is_counted(self) -> None:
        with Machine() as machine:
            x, host = torch.ones(3, device=0), torch.ones(3)
            for work in (
                lambda t: t.tolist(),
                lambda t: bool(t.any()),
                lambda t: t[t > 0],
                lambda t: float(t.sum()),
            ):
                work(host)
                before = machine.waits.total()
                work(x)
                assert machine.waits.total() == before + 1
            x.cpu()
            assert machine.waits.total() == 5
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                x.numpy()
