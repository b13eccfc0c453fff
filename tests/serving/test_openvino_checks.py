"""What has no graph for OpenVINO is refused in one sentence before anything is written; OpenVINO is
not needed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.pruners.tprl import TPRL
from tprl.serving.openvino.checks import check_convert
from tprl.serving.openvino.parts import on_cpu
from tprl.serving.settings import check_weights


@pytest.fixture
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def pruner() -> LearnedPruner:
    return load_pruner("tprl_tiny_llava")


def test_the_embedded_model_has_a_graph(lvlm: FrozenLVLM, pruner: LearnedPruner) -> None:
    check_convert(lvlm, pruner)
    lvlm.model.generation_config.eos_token_id = [3, 2]
    check_convert(lvlm, pruner)


def setting(place: str, name: str, value: Any) -> Callable[[FrozenLVLM], None]:
    """Sets an attribute somewhere in an LVLM."""

    def apply(lvlm: FrozenLVLM) -> None:
        holder: Any = lvlm
        for step in place.split("."):
            holder = getattr(holder, step)
        setattr(holder, name, value)

    return apply


PROCESSOR = "processor.image_processor"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            setting("model.config.vision_config", "model_type", "siglip_vision_model"),
            "features of its siglip_vision_m",
        ),
        (
            setting("model.config", "vision_feature_select_strategy", "full"),
            "by 'full', and target=openvino converts",
        ),
        (
            setting("model.config", "vision_feature_layer", [-2, -5]),
            "features of layers [-2, -5] side by side",
        ),
        (
            setting("model.generation_config", "eos_token_id", None),
            "has no eos_token_id, so no answer would end",
        ),
        (setting("model", "is_quantized", True), "are quantized or spread over devices"),
        (
            setting("model", "hf_device_map", {"a": 0, "b": "cpu"}),
            "are quantized or spread over devices",
        ),
        (setting(PROCESSOR, "do_center_crop", False), "has do_center_crop=False, and the program"),
        (setting(PROCESSOR, "do_pad", True), "has do_pad=True"),
        (setting(PROCESSOR, "resample", 2), "has resample=2"),
        (setting(PROCESSOR, "rescale_factor", 1 / 127.5), "has rescale_factor=0.0078"),
        (
            setting(PROCESSOR, "size", {"max_height": 96, "max_width": 96}),
            "has size={'max_height': 96",
        ),
        (
            setting(PROCESSOR, "crop_size", {"height": 90, "width": 96}),
            "has crop_size={'height': 90",
        ),
    ],
)
def test_one_sentence(
    lvlm: FrozenLVLM, pruner: LearnedPruner, change: Callable[[FrozenLVLM], None], reason: str
) -> None:
    change(lvlm)
    with pytest.raises(UserError) as caught:
        check_convert(lvlm, pruner)
    sentence = str(caught.value)
    assert reason in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_another_pruner(lvlm: FrozenLVLM) -> None:
    with pytest.raises(UserError, match="pruner divprune has no graph for OpenVINO"):
        check_convert(lvlm, load_component("pruner", "divprune"))
    with pytest.raises(
        UserError, match="tokens of width 48, and those of tiny_llava have 192: train one for it"
    ):
        check_convert(lvlm, TPRL(48, code_width=8, hidden=16))


def test_one_gpu_is_no_spread() -> None:
    """Where accelerate loads weights straight onto the only GPU, the model has a map of one
    device."""
    model: Any = nn.Linear(2, 2)
    model.hf_device_map = {"": torch.device("cuda", 0)}
    check_weights(SimpleNamespace(model=model, name="llava"))
    with pytest.raises(UserError, match="the weights of llava are quantized or spread"):
        check_weights(SimpleNamespace(model=nn.Linear(2, 2, device="meta"), name="llava"))


def test_conversion_happens_on_the_cpu() -> None:
    """Example inputs of the graphs are made there; a model that was loaded onto a GPU goes with
    them."""
    places: list[str] = []

    class OnGPU(nn.Linear):
        def cpu(self) -> "OnGPU":
            places.append("cpu")
            return self

    lvlm: Any = SimpleNamespace(model=OnGPU(2, 2).half(), device=torch.device("cuda", 0))
    pruner = OnGPU(2, 2)
    on_cpu(lvlm, pruner)
    assert places == ["cpu", "cpu"]
    assert lvlm.device == torch.device("cpu")
    assert lvlm.model.weight.dtype == torch.float32
    assert not pruner.training
