"""Random weights at the sizes of published models, on the meta device: what they cost is what
theirs cost."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.lvlm.small import SAMPLES
from tests.test_cost import LLAVA_7B

from tprl import cost
from tprl.build import choices, conf_dir, load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.policy.networks import PolicyNet
from tprl.pruners.tprl import TPRL

MODELS = {"llava_1_5_7b": "llava", "qwen2_5_vl_7b": "qwen2_5_vl"}


def geometry(name: str) -> dict[str, Any]:
    settings: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "geometry" / f"{name}.yaml"))
    return settings


def instance(name: str, **options: Any) -> FrozenLVLM:
    return load_component(
        "model", MODELS[name], pretrained=None, geometry=geometry(name), **options
    )


def parameters(lvlm: FrozenLVLM) -> float:
    return sum(weight.numel() for weight in lvlm.model.parameters()) / 1e9


def test_every_geometry_is_that_of_its_model() -> None:
    assert choices("geometry") == sorted(MODELS)
    llava, qwen = (instance(name, device="meta") for name in MODELS)
    assert llava.shape == LLAVA_7B
    assert parameters(llava) == pytest.approx(7.063, abs=1e-3)
    assert qwen.shape.lm == cost.LMShape(28, 3584, 18944, 28, 4, 128, 152064)
    assert qwen.shape.vision == cost.VisionShape(
        32, 1280, 3420, 16, patches=0, patch_size=14, cls=False, unused=0, frames=2, gated=True,
        window=8, whole=4, merge=2,
    )  # fmt: skip
    assert parameters(qwen) == pytest.approx(8.292, abs=1e-3)
    assert all(first.model.dtype == torch.bfloat16 for first in (llava, qwen))


def test_sizes_can_be_changed_and_weights_are_drawn_alike() -> None:
    small = {"text_config": {"num_hidden_layers": 3, "hidden_size": 96, "head_dim": 24}}
    state = torch.get_rng_state()
    first, two = (
        load_component("model", "llava", pretrained=None, geometry=small, dtype="float32")
        for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (first.layers, first.width) == (3, 96)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.parameters(), two.model.parameters(), strict=True)
    )
    assert len(first.answer(_prompt(first))) == 2


def _prompt(lvlm: FrozenLVLM) -> Any:
    from tprl.splice import keep_all, splice

    encoded = lvlm.encode(SAMPLES[:2])
    return splice(encoded, keep_all(encoded))


def test_the_processor_fits() -> None:
    """24 x 24 tokens of a picture of any size, and one per 28 x 28 pixels."""
    few = geometry("llava_1_5_7b")
    few["text_config"] |= {
        "hidden_size": 32,
        "head_dim": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
    }
    few["vision_config"] |= {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    lvlm = load_component("model", "llava", pretrained=None, geometry=few, dtype="float32")
    assert lvlm.encode(SAMPLES[:1]).grids == ((((24, 24),),),)


@pytest.mark.parametrize(
    ("sizes", "field"),
    [({"text_config": {"depth": 3}}, "text_config.depth"), ({"processor": {"side": 3}}, "side")],
)
def test_unknown_fields_are_refused(sizes: dict[str, Any], field: str) -> None:
    with pytest.raises(
        UserError, match=f"model.geometry names {field}, which this architecture's .* does not have"
    ):
        load_component("model", "llava", pretrained=None, geometry=sizes)


def test_weights_that_are_loaded_have_their_own_sizes() -> None:
    with pytest.raises(
        UserError, match=r"model\.geometry sizes random weights: set model\.pretrained=null"
    ):
        load_component("model", "tiny_llava", geometry={"text_config": {"num_hidden_layers": 1}})


@pytest.mark.parametrize(
    ("width", "hidden", "code_width"), [(128, 512, 64), (512, 512, 64), (128, 512, 0)]
)
@pytest.mark.parametrize("kept", [64, 192])
def test_the_selector_costs_at_most_3_percent_of_the_prefill(
    width: int, hidden: int, code_width: int, kept: int
) -> None:
    """LLaVA-1.5-7B with 64 text tokens, of which 40 are the question: TPRL's defaults, four times
    as wide, and without an autoencoder."""
    policy = TPRL(4096, code_width, hidden, width=width)
    assert isinstance(policy.net, PolicyNet)
    assert policy.serving.select == "dpp"
    parts = policy.flops_by_part(576, 40, kept)
    assert set(parts) == {"policy", "dpp"} | ({"autoencoder"} if code_width else set())
    assert sum(parts.values()) <= 0.03 * cost.prefill_flops(LLAVA_7B, 64, 576)
