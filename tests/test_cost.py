"""Exactness of the cost model against torch's own counter, and against the published check
values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tests.helpers import toy_encoded
from tests.lvlm.small import TOWER
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tprl import cost
from tprl.build import choices, load_component
from tprl.errors import UserError
from tprl.policy.autoencoder import Autoencoder
from tprl.policy.dpp import cosine_kernel
from tprl.policy.networks import PolicyInput, PolicyNet
from tprl.types import Pruner

IMAGE = 96  # placeholder token id
Shape = tuple[int, ...]
OURS = ("vision", "projector", "prefill", "decode", "lm_head")
LLAVA_7B = cost.LVLMShape(
    vision=cost.VisionShape(layers=24, width=1024, mlp=4096, heads=16, patches=576, patch_size=14),
    projector=(1024, 4096, 4096),
    lm=cost.LMShape(
        layers=32, width=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32064
    ),
)


def counter(depth: int = 8) -> FlopCounterMode:
    """FlopCounterMode that also sees the CPU's SDPA kernel, which torch 2.13 leaves out."""

    def sdpa(
        query: Shape, key: Shape, value: Shape, *_: object, out_shape: object = None, **__: object
    ) -> int:
        return sdpa_flop_count(query, key, value)

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, depth=depth, custom_mapping={op: sdpa})


def counted(fc: FlopCounterMode, module: str) -> int:
    return sum(fc.get_flop_counts()[module].values())


def held(cache: Any) -> int:
    """Bytes that a cache of transformers holds: keys and values, or states."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        else:
            states = [layer.keys, layer.values]
        total += sum(part.nbytes for part in states if part is not None)
    return total


@pytest.fixture(scope="module")
def config() -> LlavaConfig:
    vision = CLIPVisionConfig(**TOWER, image_size=32, projection_dim=32)
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,  # 6 x 16 != 48: the query width differs from the model's
        vocab_size=97,
    )
    # not in the stub of its __init__
    options: dict[str, Any] = {"image_token_id": IMAGE, "vision_feature_layer": -2}
    return LlavaConfig(vision_config=vision, text_config=text, **options)


@pytest.fixture(scope="module")
def model(config: LlavaConfig) -> nn.Module:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_pixels_to_first_token_match_the_counter(model: nn.Module, config: LlavaConfig) -> None:
    shape = cost.LVLMShape.from_llava(config)
    ids = torch.full((1, 16 + 7), 5)
    ids[0, 2:18] = IMAGE
    with counter() as fc:
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32), logits_to_keep=1)
    root = "LlavaForConditionalGeneration"
    parts = cost.total(shape, text_tokens=7, visual_tokens=16, answer_tokens=1)
    assert parts["vision"] == counted(fc, f"{root}.model.vision_tower")
    assert parts["projector"] == counted(fc, f"{root}.model.multi_modal_projector")
    assert parts["prefill"] == counted(fc, f"{root}.model.language_model")
    assert parts["lm_head"] == counted(fc, f"{root}.lm_head")
    assert parts["decode"] == 0
    assert parts["total"] == fc.get_total_flops()


@pytest.mark.parametrize(("text", "visual"), [(3, 1), (7, 5), (12, 16), (40, 16)])
@torch.no_grad()
def test_prefill_and_decode_match_the_counter(
    model: nn.Module, config: LlavaConfig, text: int, visual: int
) -> None:
    shape = cost.LVLMShape.from_llava(config)
    length = text + visual
    with counter() as fc:
        out = model(inputs_embeds=torch.zeros(1, length, 48), use_cache=True, logits_to_keep=1)
    assert fc.get_total_flops() == cost.prefill_flops(shape, text, visual) + cost.lm_head_flops(
        shape
    )
    steps = 0
    for step in range(1, 3):
        with counter() as fc:
            mask = torch.ones(1, length + step, dtype=torch.long)
            out = model(
                input_ids=torch.tensor([[5]]),
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
        steps += fc.get_total_flops() - cost.lm_head_flops(shape)
        assert steps == cost.decode_flops(shape, text, visual, steps=step)


@torch.no_grad()
def test_a_generated_answer_costs_what_total_says(model: nn.Module, config: LlavaConfig) -> None:
    shape = cost.LVLMShape.from_llava(config)
    ids = torch.full((1, 16 + 4), 5)
    ids[0, 1:17] = IMAGE
    with counter() as fc:
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.zeros(1, 3, 32, 32),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == 20 + 5
    assert (
        fc.get_total_flops()
        == cost.total(shape, text_tokens=4, visual_tokens=16, answer_tokens=5)["total"]
    )


@pytest.mark.parametrize(
    ("visual", "tera_macs"), [(576, 4.252), (192, 1.675), (128, 1.253), (64, 0.833)]
)
def test_prefill_of_the_7b_geometry(visual: int, tera_macs: float) -> None:
    """The check values of docs/baselines.md#flops, gated MLP, 64 text tokens."""
    assert cost.prefill_flops(LLAVA_7B, 64, visual) / 2e12 == pytest.approx(tera_macs, abs=5e-4)


def test_real_geometry_as_counted() -> None:
    """What FlopCounterMode counted of the 7B language model, without its head, on the meta
    device."""
    for visual, tera in ((576, 8.1774), (64, 1.3527)):
        assert cost.prefill_flops(LLAVA_7B, 40, visual) / 1e12 == pytest.approx(tera, abs=5e-5)
    layer = cost.encoder_layer_flops(1024, 4096, 577)
    assert 23 * layer / 2e12 == pytest.approx(0.183, abs=2e-3)
    assert cost.vision_flops(LLAVA_7B) == 24 * layer + 2 * 576 * 1024 * 3 * 14 * 14


@torch.no_grad()
@pytest.mark.slow
def test_the_7b_geometry_on_the_meta_device() -> None:
    """Every part of LLaVA-1.5-7B without its weights, and its cache."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    options: dict[str, Any] = {"image_token_index": 32000, "vision_feature_layer": -2}
    text = LlamaConfig(vocab_size=32064)
    config = LlavaConfig(vision_config=vision, text_config=text, **options)
    assert cost.LVLMShape.from_llava(config) == LLAVA_7B
    with torch.device("meta"):
        parts = LlavaForConditionalGeneration(config).eval().model
        with counter() as fc:
            parts.get_image_features(torch.zeros(1, 3, 336, 336))
        assert fc.get_total_flops() == cost.vision_flops(LLAVA_7B) + cost.projector_flops(LLAVA_7B)
        for visual in (576, 192):
            cache = DynamicCache(config=text)
            with counter() as fc:
                parts.language_model(
                    inputs_embeds=torch.zeros(1, 64 + visual, 4096), past_key_values=cache
                )
            assert fc.get_total_flops() == cost.prefill_flops(LLAVA_7B, 64, visual)
            assert held(cache) == cost.kv_bytes(LLAVA_7B.lm, 64 + visual, dtype_bytes=4)
            with counter() as fc:
                parts.language_model(inputs_embeds=torch.zeros(1, 1, 4096), past_key_values=cache)
            assert fc.get_total_flops() == cost.decode_flops(LLAVA_7B, 64, visual, steps=1)


def test_the_cache_of_the_7b_geometry() -> None:
    """Half a MiB per token in bfloat16: 32 layers x 32 heads x 128 numbers x keys and values."""
    assert cost.kv_bytes(LLAVA_7B.lm, 1) == 2**19
    assert cost.kv_bytes(LLAVA_7B.lm, [640] * 2 + [128] * 30) == (2 * 640 + 30 * 128) * 2**14
    assert cost.kv_bytes(replace(LLAVA_7B.lm, kv_heads=4), 1) == 2**16
    assert cost.layer_mean([576] * 2 + [64] * 30) == 96


def test_the_papers_54_percent() -> None:
    """-54.2 % FLOPs at 576 -> 192: which convention and which length of text give it (see
    `tprl.cost`)."""

    def percent(text: int, shape: cost.LVLMShape = LLAVA_7B, parts: Sequence[str] = OURS) -> float:
        return 100 * cost.saved(shape, text_tokens=text, visual_tokens=576, kept=192, parts=parts)

    lm_only, with_tower = ("prefill",), ("vision", "prefill")
    # its formula has an MLP of two matrices
    fastv = replace(LLAVA_7B, lm=replace(LLAVA_7B.lm, gated=False))
    used = replace(fastv, vision=replace(LLAVA_7B.vision, layers=23))
    # Ours, at the length of text that fits, at the 64 tokens of our benchmarks, and without text.
    assert percent(110) == pytest.approx(54.2, abs=0.05)
    assert percent(64) == pytest.approx(57.8, abs=0.05)
    assert percent(0) == pytest.approx(63.8, abs=0.05)
    # The language model alone: docs/baselines.md#flops has the same numbers from its own formula.
    assert percent(142, parts=lm_only) == pytest.approx(54.2, abs=0.05)
    assert percent(64, parts=lm_only) == pytest.approx(60.6, abs=0.05)
    assert percent(64, fastv, parts=lm_only) == pytest.approx(60.8, abs=0.05)
    assert percent(0, fastv, parts=lm_only) == pytest.approx(67.3, abs=0.05)
    assert percent(108, used, parts=with_tower) == pytest.approx(54.2, abs=0.05)
    assert percent(64, used, parts=with_tower) == pytest.approx(57.6, abs=0.05)


def test_windows_at_the_edges_are_smaller() -> None:
    """5 x 3 patches in windows of 2 x 2, by hand: 4, 2, 4, 2, 2 and 1 patches."""
    tower = cost.VisionShape(1, 10, 0, 1, patches=0, patch_size=1, channels=0, cls=False, window=2)
    pairs = 16 + 4 + 16 + 4 + 4 + 1
    assert cost.tower_flops(tower, (5, 3)) == 8 * 15 * 10**2 + 4 * 10 * pairs
    assert cost.tower_flops(replace(tower, whole=1), (5, 3)) == cost.encoder_layer_flops(10, 0, 15)


def test_towers_that_read_any_grid_need_it() -> None:
    shape = replace(LLAVA_7B, vision=replace(LLAVA_7B.vision, patches=0))
    assert cost.vision_flops(shape, [(24, 24)] * 2) == cost.vision_flops(LLAVA_7B, images=2)
    assert cost.projector_flops(shape, [(24, 24)]) == cost.projector_flops(LLAVA_7B)
    with pytest.raises(ValueError, match=r"give \(rows, columns\) of each"):
        cost.vision_flops(shape, images=1)


@torch.no_grad()
def test_a_siglip_tower_without_its_pooling_head(config: LlavaConfig) -> None:
    for head in (True, False):
        vision = SiglipVisionConfig(**TOWER, image_size=32)
        vision.vision_use_head = head
        options: dict[str, Any] = {"vision_feature_select_strategy": "full"}
        shape = cost.LVLMShape.from_llava(
            LlavaConfig(vision_config=vision, text_config=config.text_config, **options)
        )
        with counter() as fc:
            SiglipVisionModel(vision).eval()(torch.zeros(2, 3, 32, 32))
        assert fc.get_total_flops() == cost.vision_flops(shape, images=2)


def test_tokens_dropped_inside_the_model_are_counted_per_layer() -> None:
    uneven = cost.prefill_flops(LLAVA_7B, 40, [576] * 2 + [64] * 30)
    full, small = cost.prefill_flops(LLAVA_7B, 40, 576), cost.prefill_flops(LLAVA_7B, 40, 64)
    assert uneven * 32 == 2 * full + 30 * small
    with pytest.raises(ValueError, match="one per layer"):
        cost.prefill_flops(LLAVA_7B, 40, [576, 64])


def test_total_is_the_sum_of_its_parts() -> None:
    parts = cost.total(
        LLAVA_7B,
        text_tokens=40,
        visual_tokens=64,
        answer_tokens=3,
        images=2,
        selector={"divprune": 12345},
    )
    assert list(parts) == [
        "vision",
        "projector",
        "divprune",
        "prefill",
        "decode",
        "lm_head",
        "total",
    ]
    assert parts.pop("total") == sum(parts.values())
    assert parts["vision"] == 2 * cost.vision_flops(LLAVA_7B)
    assert parts["lm_head"] == 3 * 2 * 4096 * 32064


# Policies, what wraps one, and what runs parts of the model.
UNCOUNTED = {"pooling", "resize", "word_attention", "attention_words", "core_focus"}
UNCOUNTED |= {"keyword_budget", "tprl", "tprl_adaptive", "mlp", "scorer_mmr"}
SELECTORS = [
    made
    for name in choices("pruner")
    if name not in UNCOUNTED
    for made in [load_component("pruner", name)]
    if isinstance(made, Pruner)
]


@pytest.mark.parametrize("kept", [1, 2, 16, 33, 63])
@pytest.mark.parametrize("pruner", SELECTORS, ids=[one.name for one in SELECTORS])
def test_selectors_match_the_counter(pruner: Any, kept: int) -> None:
    """64 tokens of width 16, vision width 24 in 3 heads and 6 blocks, a projector of one layer."""
    encoded = toy_encoded((((8, 8),),), width=16, vision_width=24, extras=pruner.extras)
    vision = cost.VisionShape(7, 24, 96, 3, patches=64, patch_size=8)
    shape = cost.LVLMShape(vision, (24, 16), cost.LMShape(2, 16, 32, 2, 2, 8, 100))
    with counter() as fc:
        pruner.select(encoded, kept / 64)
    # Greedy MAP is written elementwise, so the counter does not see its products
    # (`cost.dpp_flops`). ToMe is charged the difference to one pass of the tower and the projector,
    # and `select` is a second one.
    second = 6 * cost.encoder_layer_flops(24, 96, 65) + cost.projector_flops(shape)
    greedy = ("_dpp", "cdpruner", "_color")
    unseen = 2 * kept**2 * 64 if pruner.name.endswith(greedy) else 0
    unseen -= second if pruner.name == "tome" else 0
    assert fc.get_total_flops() == pruner.flops(shape, 64, kept) - unseen


@pytest.mark.parametrize("query", ["tokens", "pooled", "none"])
@pytest.mark.parametrize("positions", [True, False])
@torch.no_grad()
def test_policy_matches_the_counter(
    query: Literal["tokens", "pooled", "none"], positions: bool
) -> None:
    net = PolicyNet(
        code_width=10, query_width=14, width=16, layers=2, heads=4, query=query, positions=positions
    )
    alive = torch.ones(1, 9, dtype=torch.bool)
    words = torch.ones(1, 5, dtype=torch.bool)
    x = PolicyInput(
        torch.zeros(1, 9, 10), torch.zeros(1, 9, 2), alive, torch.zeros(1, 5, 14), words
    )
    with counter() as fc:
        net(x, alive, 0, torch.tensor([0.5]))
    assert fc.get_total_flops() == cost.policy_flops(
        cost.PolicyShape.from_net(net), tokens=9, words=5
    )


@torch.no_grad()
def test_autoencoder_matches_the_counter() -> None:
    net = Autoencoder(in_width=12, code_width=4, hidden=20)
    with counter() as fc:
        net.encode(torch.zeros(1, 7, 12))
    assert fc.get_total_flops() == cost.autoencoder_flops(12, 20, 4, tokens=7)
    with counter() as fc:
        net(torch.zeros(1, 7, 12))
    assert fc.get_total_flops() == cost.autoencoder_flops(12, 20, 4, tokens=7, decode=True)


def test_dpp_kernel_matches_the_counter() -> None:
    with counter() as fc:
        cosine_kernel(torch.ones(1, 9, 6), torch.ones(1, 9, dtype=torch.bool))
    assert fc.get_total_flops() == cost.dpp_flops(9, 6, kept=0)
    assert cost.dpp_flops(9, 6, kept=4) - cost.dpp_flops(9, 6, kept=0) == 2 * 4 * (4 * 9)


def test_the_policy_is_small_beside_the_model() -> None:
    """docs/baselines.md#flops: two layers of width 512 on 576 tokens of width 4096 are about 0.005
    T MAC."""
    policy = cost.PolicyShape(code_width=4096, query_width=4096, width=512, layers=2)
    assert cost.policy_flops(policy, tokens=576, words=40) / 2e12 == pytest.approx(0.0062, abs=5e-4)


def test_selector_of_the_7b_geometry() -> None:
    assert load_component("pruner", "random").flops(LLAVA_7B, 576, 64) == 0
    assert load_component("pruner", "divprune").flops(LLAVA_7B, 576, 64) == 2_717_908_992


def test_other_towers_are_refused_in_one_sentence(config: LlavaConfig) -> None:
    siglip = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model"}, text_config=config.text_config
    )
    with pytest.raises(
        UserError,
        match=r"a siglip_vision_model whose features are selected by 'default' \(it knows ",
    ):
        cost.LVLMShape.from_llava(siglip)
    siglip.vision_config = Dinov2Config()
    with pytest.raises(
        UserError, match=r"does not know a dinov2 whose .* can be trained on but not evaluated"
    ):
        cost.LVLMShape.from_llava(siglip)
