"""The cost model of every family against torch's counter on the stock class: equal to the last
FLOP."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.lvlm.small import TOWER, each_family
from tests.test_cost import LLAVA_7B, counted, counter, held
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from tprl import cost
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.batching import axes
from tprl.lvlm.frozen import GREEDY, FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner, dropping
from tprl.lvlm.llava import Llava
from tprl.scoring.flops import question_flops
from tprl.scoring.scorer import Scorer
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Sample, TokenSelection

# (width, height) of the images of a prompt. 672 x 340 is a 2 x 2 canvas of LLaVA-NeXT whose rest is
# mostly padding.
PROMPTS = [
    [(100, 100)],
    [(200, 60)],
    [(672, 340)],
    [(150, 150), (60, 200)],
    [(50, 40), (340, 672), (56, 56)],
    [],
]
TWO, THREE = PROMPTS[3], PROMPTS[4]


def prompts(*quick: list[tuple[int, int]]) -> list[Any]:
    """All prompts as parameters; those that are not `quick` repeat a kind and are slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(sizes, id=str(sizes), marks=[] if sizes in quick else slow)
        for sizes in PROMPTS
    ]


# Where in the stock class images become tokens: the tower (in which Qwen's projectors are), and the
# projectors.
PARTS = {
    "llava": ("vision_tower", ["multi_modal_projector"]),
    "llava_next": ("vision_tower", ["multi_modal_projector"]),
    "llava_onevision": ("vision_tower", ["multi_modal_projector"]),
    "gemma3": ("vision_tower", ["multi_modal_projector"]),
    "gemma4": ("vision_tower", ["embed_vision"]),
    "mistral3": ("vision_tower", ["multi_modal_projector"]),
    "internvl": ("vision_tower", ["multi_modal_projector"]),
    "smolvlm": ("vision_model", ["connector"]),
    "qwen2_vl": ("visual", ["visual.merger"]),
    "qwen2_5_vl": ("visual", ["visual.merger"]),
    "qwen3_5": ("visual", ["visual.merger"]),
    "glm4v": ("visual", ["visual.downsample", "visual.merger"]),
    "qwen3_vl": (
        "visual",
        ["visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1"],
    ),
}
ANSWER = "red"  # 3 bytes, so 3 tokens and the end token, and a space where the template writes one


class WithSiglip(Llava):
    """A LLaVA whose tower is a SigLIP."""

    @staticmethod
    def blueprint() -> tuple[Any, Any]:
        model, processor = Llava.blueprint()
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
        vision = SiglipVisionConfig(**TOWER, image_size=48)
        config = LlavaConfig(
            vision_config=vision,
            text_config=model.config.text_config,
            image_token_index=model.config.image_token_index,
            vision_feature_select_strategy="full",
        )
        return LlavaForConditionalGeneration(config), processor


@pytest.fixture(scope="module", params=[*each_family(), "siglip"])
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    options = {"pretrained": None, "dtype": "float32", "prompt": None}
    if request.param == "siglip":
        vision_model: FrozenLVLM = WithSiglip(name="siglip", **options)
    else:
        vision_model = load_component("model", request.param, **options)
    vision_model.max_new_tokens = vision_model.answer_length(ANSWER)
    vision_model.model.generation_config.eos_token_id = None  # every answer has its full length
    return vision_model


def sample(sizes: list[tuple[int, int]]) -> Sample:
    draw = np.random.default_rng(0)
    pixels = (draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes)
    return Sample("one", tuple(map(Image.fromarray, pixels)), "is it red?", (ANSWER,))


def spent(fc: FlopCounterMode, lvlm: FrozenLVLM, path: str) -> int:
    """FLOPs of a part of the stock class, which is called in its `forward`, or by `generate` before
    that."""
    first, *remainder = path.split(".")
    alone = ".".join([type(getattr(lvlm.model.model, first)).__name__, *remainder])
    counts = fc.get_flop_counts()
    return sum(
        sum(counts[name].values())
        for name in (f"{type(lvlm.model).__name__}.model.{path}", alone)
        if name in counts
    )


def flops(
    lvlm: FrozenLVLM,
    encoded: Encoded,
    asked: Sample,
    pruner: Any,
    kept: list[int],
    plan: Any = None,
) -> Any:
    return question_flops(Scorer(lvlm, Scenes("val")), encoded, 0, asked, pruner, kept, plan)


@pytest.mark.parametrize("sizes", prompts([(672, 340)], THREE, []))
@torch.no_grad()
def test_the_stock_model_part_by_part(lvlm: FrozenLVLM, sizes: list[tuple[int, int]]) -> None:
    asked = sample(sizes)
    encoded = lvlm.encode([asked])
    visual = int(encoded.visual_mask.sum())
    parts = cost.total(
        lvlm.shape,
        text_tokens=int(encoded.attention.sum()) - visual,
        visual_tokens=visual,
        answer_tokens=lvlm.max_new_tokens,
        images=sum(encoded.tiles[0], ()),
    )
    with counter() as fc:
        lvlm.model.generate(
            **stock_inputs(lvlm, [asked]), max_new_tokens=lvlm.max_new_tokens, **GREEDY
        )
    tower, projectors = PARTS[lvlm.model_type]
    language = "text_model" if lvlm.model_type == "smolvlm" else "language_model"
    projector = sum(spent(fc, lvlm, name) for name in projectors)
    inside = projector if tower == "visual" else 0
    vision = spent(fc, lvlm, tower) - inside
    # The stock class pairs patches of all images of a call, and masks them: counted one by one.
    beyond = vision - alone(lvlm, sizes) if lvlm.model_type == "mistral3" else 0
    assert (beyond > 0) == (lvlm.model_type == "mistral3" and len(sizes) > 1)
    assert parts["vision"] == vision - beyond
    assert parts["projector"] == projector
    assert parts["prefill"] + parts["decode"] == spent(fc, lvlm, language)
    assert parts["lm_head"] == counted(fc, f"{type(lvlm.model).__name__}.lm_head")
    assert parts["total"] == fc.get_total_flops() - beyond
    assert (parts["vision"] > 0) == bool(sizes)


def alone(lvlm: FrozenLVLM, sizes: list[tuple[int, int]]) -> int:
    """FLOPs of the stock tower on images of these sizes, one after the other."""
    total = 0
    for size in sizes:
        with counter() as fc:
            lvlm.model(**stock_inputs(lvlm, [sample([size])]))
        total += spent(fc, lvlm, PARTS[lvlm.model_type][0])
    return total


@pytest.mark.parametrize("sizes", prompts([(200, 60)], TWO))
@torch.no_grad()
def test_a_pruned_question_from_pixels_to_its_last_token(
    lvlm: FrozenLVLM, sizes: list[tuple[int, int]]
) -> None:
    # DivPrune pads the images of a prompt to the largest, which is not its cost.
    asked, pruner = (
        sample(sizes),
        load_component("pruner", "divprune" if len(sizes) == 1 else "random"),
    )
    with counter() as fc:
        encoded = lvlm.encode([asked])
        selection = pruner.select(encoded, 1 / 3)
        lvlm.answer(splice(encoded, selection))
    pruned, full = flops(lvlm, encoded, asked, pruner, selection.per_image(encoded)[0])
    assert pruned == fc.get_total_flops()
    with counter() as fc:
        lvlm.answer(splice(lvlm.encode([asked]), keep_all(encoded)))
    assert full == fc.get_total_flops()


@torch.no_grad()
def test_selectors_that_read_vision_features(lvlm: FrozenLVLM) -> None:
    """What the projector reads may be several patches side by side."""
    pruner = load_component("pruner", "vispruner")
    if pruner.extras - lvlm.known_extras or "siglip" in lvlm.name:
        pytest.skip("refused: no CLS attention")
    encoded = lvlm.encode([sample([(100, 100), (60, 200)])], pruner.extras)
    images = TokenSelection(encoded.visual_mask).per_image(encoded)[0]
    with counter() as fc:
        pruner.select(encoded, 1 / 3)
    # Images of a batch are padded to the largest.
    assert fc.get_total_flops() == len(images) * pruner.flops(lvlm.shape, max(images), 1)


@torch.no_grad()
def generated(lvlm: FrozenLVLM, prompt: Prompt, plan: LayerPlan | None = None) -> Any:
    """The KV cache after the whole answer."""
    with lvlm.deepstack(prompt.deep, prompt.visual), dropping(lvlm.model, prompt, plan):
        return lvlm.model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention.long(),
            position_ids=axes(prompt.positions),
            **lvlm.inputs_beside(prompt.input_ids, prompt.visual),
            max_new_tokens=lvlm.max_new_tokens,
            return_dict_in_generate=True,
            **GREEDY,
        ).past_key_values


def test_bytes_of_the_cache_are_those_that_it_holds(lvlm: FrozenLVLM) -> None:
    encoded = lvlm.encode([sample([(150, 150), (60, 200)])])
    text = int(encoded.attention.sum() - encoded.visual_mask.sum())
    for ratio in (1.0, 1 / 3):
        selection = load_component("pruner", "random").select(encoded, ratio)
        # the last answer token is never read
        tokens = text + int(selection.count) + lvlm.max_new_tokens - 1
        assert held(generated(lvlm, splice(encoded, selection))) == cost.kv_bytes(
            lvlm.shape.lm, tokens, 4
        )


@torch.no_grad()
def test_a_method_between_layers(lvlm: FrozenLVLM) -> None:
    """FLOPs, cached bytes and the layer average, with another budget for every image."""
    if lvlm.model_type == "qwen3_vl":
        pytest.skip("refused: its layers that add deepstack features come first")
    if lvlm.definition != "masked":
        pytest.skip("refused: not all layers attend to all tokens")
    asked, pruner = sample([(150, 150), (60, 200)]), load_component("pruner", "fastv")
    assert isinstance(pruner, LayerPruner)
    plan, encoded = LayerPlan.of(pruner, 0.7, lvlm.layers), lvlm.encode([asked])
    prompt, images = splice(encoded, keep_all(encoded)), keep_all(encoded).per_image(encoded)[0]
    text = int(encoded.attention.sum()) - sum(images)
    with counter() as fc:
        lvlm.encode([asked])
        lvlm.answer(prompt, plan)
    result, full = flops(lvlm, encoded, asked, pruner, images, plan)
    assert result == fc.get_total_flops()
    assert result < full
    counts = plan.counts(*images)
    tokens = [text + count + lvlm.max_new_tokens - 1 for count in counts]
    assert held(generated(lvlm, prompt, plan)) == cost.kv_bytes(lvlm.shape.lm, tokens, 4)
    assert cost.layer_mean(counts) == pytest.approx(0.7 * sum(images), abs=len(images))


def test_every_image_pays_for_its_own_selection(lvlm: FrozenLVLM) -> None:
    """Two images of different sizes: not twice the mean one."""
    asked, pruner = sample([(100, 100), (60, 200)]), load_component("pruner", "divprune")
    encoded = lvlm.encode([asked])
    images = keep_all(encoded).per_image(encoded)[0]
    assert sum(images) == int(encoded.visual_mask.sum())
    spent = (
        flops(lvlm, encoded, asked, pruner, images)[0]
        - flops(lvlm, encoded, asked, pruner, images)[1]
    )
    assert spent == sum(2 * n * n * lvlm.width for n in images)


LANGUAGE = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
} | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("kind", sorted(k for k in cost.LANGUAGE_MODELS if not k.endswith("_text")))
@torch.no_grad()
def test_every_language_model_that_is_known(kind: str) -> None:
    config = AutoConfig.for_model(kind, **LANGUAGE, sliding_window=None)
    model, lm = AutoModelForCausalLM.from_config(config).eval(), cost.LMShape.of(config)
    with counter() as fc:
        model(inputs_embeds=torch.zeros(1, 19, 48), logits_to_keep=1)
    assert fc.get_total_flops() == 2 * cost.lm_layer_flops(lm, 19, 19) + 2 * 48 * 97


def test_unknown_language_models_are_refused_in_one_sentence() -> None:
    lvlm = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
    lvlm.model.config.text_config.model_type = "qwen3_moe"
    with pytest.raises(
        UserError,
        match=r"does not know the language model 'qwen3_moe' \(it knows .*llama, .*mistral,.*\): ",
    ):
        _ = lvlm.shape


@pytest.mark.parametrize("window", [1000, 19, 6])
@torch.no_grad()
def test_sliding_windows(window: int) -> None:
    """The whole matrix of the prompt, then what is left in the cache."""
    config = AutoConfig.for_model("mistral", **LANGUAGE, sliding_window=window)
    model, lm = AutoModelForCausalLM.from_config(config).eval(), cost.LMShape.of(config)
    shape = replace(LLAVA_7B, lm=lm)
    ids, cache = torch.zeros(1, 19, dtype=torch.long), None
    with counter() as fc:
        for new in (ids, ids[:, :1], ids[:, :1]):
            cache = model(input_ids=new, past_key_values=cache, logits_to_keep=1).past_key_values
    expected = cost.prefill_flops(shape, 19, 0) + cost.decode_flops(shape, 19, 0, 2)
    assert fc.get_total_flops() == expected + cost.lm_head_flops(shape, 3)
    assert held(cache) == cost.kv_bytes(lm, 21, 4)


def test_unknown_layers_are_refused_in_one_sentence() -> None:
    config = AutoConfig.for_model("qwen2", num_hidden_layers=2)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(
        UserError, match=r"does not know layers of chunked_attention \(in this qwen2\): such"
    ):
        cost.LMShape.of(config)


def test_unknown_pixel_shuffles_are_refused_in_one_sentence() -> None:
    lvlm = load_component("model", "internvl3", pretrained=None, dtype="float32")
    lvlm.model.config.vision_config.patch_size = [4, 2]
    with pytest.raises(
        UserError, match=r"patches of \[4, 2\] pixels .* can be trained on but not evaluated"
    ):
        _ = lvlm.shape
