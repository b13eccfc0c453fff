"""Families that generic tests leave to the slow suite: what each has to itself, and its parity."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from PIL import Image
from tests.lvlm.small import FIRST, families
from tests.lvlm.test_families import SAMPLES, some
from tests.lvlm.test_flops import sample
from tests.test_cost import counter

import tprl
from tprl import cost
from tprl.bench.parity import Parity, defined, forward, masked, parity, stock_inputs
from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.splice import keep_all, splice
from tprl.types import Sample

LATER = tuple(name for name in families() if name not in FIRST)
TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))


def small(name: str, **options: Any) -> FrozenLVLM:
    return load_component(
        "model", name, pretrained=None, dtype="float32", max_new_tokens=2, **options
    )


shared = lru_cache(small)  # of tests that change nothing


# Gemma 4's stock processor takes no fewer than 280 patches of an image.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "gemma4" else []) for n in LATER],
)
def test_exact(name: str) -> None:
    differences = parity(shared(name), [SAMPLES[0], TWO], steps=2)
    assert is_exact(differences)
    assert differences.std > 0.3


def is_exact(differences: Parity) -> bool:
    largest = max(differences.keep_all, differences.pruned, differences.decode, differences.batch)
    return largest <= 1e-5 and differences.same_ids


@pytest.mark.parametrize("name", LATER)
def test_the_cost_of_a_prompt(name: str) -> None:
    """Part by part, pruned and decoded: test_flops.py."""
    forecast, counted = flops_of_a_prompt(shared(name))
    assert forecast == counted


@torch.no_grad()
def flops_of_a_prompt(lvlm: FrozenLVLM) -> tuple[int, int]:
    """Of an unpruned one, by the cost model and by torch's counter."""
    asked = sample([(90, 60)])
    encoded = lvlm.encode([asked])
    visual = int(encoded.visual_mask.sum())
    text, images = int(encoded.attention.sum()) - visual, sum(encoded.tiles[0], ())
    with counter() as fc:
        lvlm.model(**stock_inputs(lvlm, [asked]), logits_to_keep=1)
    total = cost.total(lvlm.shape, text_tokens=text, visual_tokens=visual, images=images)["total"]
    return total, fc.get_total_flops()


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3_5"])
def test_masking_is_not_dropping(name: str) -> None:
    """Why these families have another definition: gaps in windows, steps in states."""
    lvlm, samples = shared(name), [SAMPLES[0], TWO]
    encoded = lvlm.encode(samples)
    selection = some(encoded)
    reference = masked(encoded, selection)
    shorter = defined(lvlm, samples, selection)[:, -1]
    assert (forward(lvlm, reference)[:, -1] - shorter).abs().max() > 0.05
    pruned = forward(lvlm, splice(encoded, selection))[:, -1]
    assert torch.allclose(pruned, shorter, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3_5"])
def test_methods_between_layers_are_refused(name: str) -> None:
    lvlm = shared(name)
    what = "linear attention" if name == "qwen3_5" else "sliding attention"
    sentence = rf"^fastv reads layers of the language model, and this LVLM has layers of {what},"
    with pytest.raises(UserError, match=sentence):
        tprl.prune(lvlm.model, "fastv", keep_ratio=0.5)
    with pytest.raises(UserError, match=sentence):
        lvlm.check_layers("fastv")
    # So is attention of words, with the other extras and before anything is encoded.
    with pytest.raises(UserError, match=sentence.replace("fastv", "word_attention")):
        lvlm.check_extras(frozenset({"word_attention"}), lvlm.known_extras)


class TestGemma3:
    def test_gates_are_pruning_where_a_prompt_fits_the_window(self) -> None:
        lvlm = small("gemma3", geometry={"text_config": {"sliding_window": 4096}})
        encoded, answers = lvlm.encode([SAMPLES[0], TWO]), ["red", "yes"]
        selection = some(encoded)
        expected = lvlm.score(splice(encoded, selection), answers)[0]
        result = lvlm.gated_log_prob(encoded, selection.keep.float(), answers)
        assert torch.allclose(result, expected, atol=1e-3)
        lvlm.model.config.text_config.sliding_window = 24
        with pytest.raises(UserError, match=r"a prompt of \d+ tokens is longer than the window of"):
            lvlm.gated_log_prob(encoded, selection.keep.float(), answers)

    @pytest.mark.slow
    def test_crops_of_pan_and_scan_are_images_of_their_own(self) -> None:
        lvlm, image = small("gemma3"), SAMPLES[0].images[0].resize((96, 48))
        scan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
        inputs = lvlm.processor(
            text=[lvlm.render(SAMPLES[0])], images=[[image]], return_tensors="pt", **scan
        )
        assert len(inputs["pixel_values"]) == 3
        with tprl.prune(lvlm.model, "divprune", keep_ratio=1 / 3) as pruning:
            lvlm.model.generate(**inputs, max_new_tokens=2)
        assert [len(crop.indices) for crop in pruning.kept[0]] == [3, 3, 3]

    def test_an_image_sees_itself_whole_and_no_later_one(self) -> None:
        lvlm = small("gemma3")
        encoded = lvlm.encode([TWO])
        ids = torch.nn.functional.pad(encoded.input_ids, (0, 2))
        (types,) = lvlm.inputs_beside(ids, encoded.is_visual)["token_type_ids"]
        assert types.tolist() == [*encoded.is_visual[0].int().tolist(), 0, 0]
        prompt = splice(encoded, keep_all(encoded))
        blind = {"token_type_ids": torch.zeros_like(encoded.input_ids)}
        expected = forward(lvlm, prompt)
        lvlm.inputs_beside = lambda ids, visual: blind  # type: ignore[method-assign]
        assert (forward(lvlm, prompt) - expected).abs().max() > 0.02


class TestGemma4:
    @pytest.mark.slow
    def test_the_large_model_has_neither_shared_keys_nor_layer_embeddings(self) -> None:
        """Keys serve as values in its layers of full attention."""
        sizes = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        large = small("gemma4", geometry={"text_config": {**sizes, "attention_k_eq_v": True}})
        assert [block.kv_projections for block, _ in large.shape.lm.blocks] == [2, 1, 1]
        differences = parity(large, [SAMPLES[0], TWO], steps=2)
        assert is_exact(differences)
        assert differences.std > 0.1  # its weights are not scaled up
        forecast, counted = flops_of_a_prompt(large)
        assert forecast == counted

    def test_gates_are_refused(self) -> None:
        lvlm = small("gemma4")
        with pytest.raises(UserError, match="gemma4 has layers of sliding attention, where a gate"):
            lvlm.check_gates()

    def test_experts_can_be_trained_on_and_not_evaluated(self) -> None:
        lvlm = small("gemma4")
        lvlm.model.config.text_config.enable_moe_block = True
        with pytest.raises(UserError, match="the mixture of experts of this gemma4_text: such an"):
            _ = lvlm.shape

    def test_bounds_are_those_of_the_processor(self) -> None:
        assert small("gemma4", max_pixels=5000).processor.image_processor.max_soft_tokens == 70
        with pytest.raises(UserError, match=r"is less than the 4480 pixels of the 70 tokens"):
            small("gemma4", max_pixels=4000)


class TestLlavaOnevision:
    def test_an_image_among_others_is_one_padded_view(self) -> None:
        lvlm, image = small("llava_onevision"), Image.new("RGB", (90, 40), (200, 30, 30))
        alone, both = (
            Sample(uid, images, "is it red?", ("yes",))
            for uid, images in (("a", (image,)), ("b", (image, image)))
        )
        encoded = lvlm.encode([alone, both])
        assert encoded.grids[0] == (((3, 3), (3, 6)),)
        assert encoded.grids[1] == (((3, 3),), ((3, 3),))
        assert encoded.tiles[0] == (((3, 3),) * 3,)
        assert encoded.seen == (
            ((0.0, 0.0, 90.0, 40.0),),
            ((0.0, -25.0, 90.0, 65.0), (0.0, -25.0, 90.0, 65.0)),
        )
        # both views of the same picture, and not those that it has alone
        first, second = encoded.visual[1, :9], encoded.visual[1, 9:18]
        assert torch.equal(first, second)
        assert (encoded.visual[0, :9] - first).abs().max() > 0.05

    def test_many_crops_are_interpolated_as_the_stock_class_does(self) -> None:
        lvlm = small("llava_onevision")
        lvlm.model.config.vision_aspect_ratio = "anyres_max_2"
        lvlm.processor.vision_aspect_ratio = "anyres_max_2"
        asked = sample([(90, 90)])
        encoded = lvlm.encode([asked], frozenset({"vision_features", "cls_attention"}))
        assert encoded.grids[0] == (((3, 3), (4, 4)),)
        assert encoded.extras["cls_attention"].shape == (1, 25)
        stock = stock_inputs(lvlm, [asked])
        with torch.no_grad():
            expected = lvlm.model(**stock, logits_to_keep=1).logits
        assert torch.equal(forward(lvlm, splice(encoded, keep_all(encoded))), expected)


class TestMistral3:
    def test_padding_beside_a_larger_image_changes_nothing(self) -> None:
        lvlm = small("mistral3")
        images = [Image.new("RGB", size, (200, 30, 30)) for size in ((100, 100), (60, 30))]
        inputs = lvlm.processor(text=["[IMG][IMG]"], images=[images], return_tensors="pt")
        (item,) = lvlm.processor(text=["[IMG]"], images=[images[1:]], return_tensors="pt")[
            "pixel_values"
        ]
        pixels = lvlm.pixels_of(inputs)
        assert pixels["image_grid_thw"].tolist() == [[1, 8, 8], [1, 4, 6]]
        alone = lvlm.pixels_of({"pixel_values": item[None], "image_sizes": [item.shape[1:]]})
        assert torch.equal(pixels["pixel_values"][64:], alone["pixel_values"])

    def test_it_needs_no_torchvision(self) -> None:
        from tprl.lvlm.mistral3 import stock_processor

        assert stock_processor().__name__ == "PixtralProcessor"

    def test_queries_scaled_by_position_bar_methods_between_layers(self) -> None:
        lvlm = small("mistral3")
        lvlm.check_layers("fastv")
        lvlm.model.config.text_config.rope_parameters["llama_4_scaling_beta"] = 0.1
        with pytest.raises(UserError, match="this LVLM has queries scaled by position, where"):
            lvlm.check_layers("fastv")


def test_models_that_think_are_asked_for_an_answer_at_once() -> None:
    lvlm = small("qwen3_5")
    thinking = "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}"
    lvlm.processor.chat_template += thinking
    assert lvlm.render(SAMPLES[0]).endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_mixture_of_experts_is_refused() -> None:
    lvlm = small("qwen3_5")
    lvlm.model.config.text_config.model_type = "qwen3_5_moe_text"
    with pytest.raises(UserError, match=r"does not know the language model 'qwen3_5_moe_text'"):
        _ = lvlm.shape
