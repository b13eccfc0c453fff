"""What `tprl.prune` refuses, and in which words."""

from typing import Any

import pytest
import torch
from tests.helpers import untrained_policy
from tests.lvlm.small import TEXT
from tests.lvlm.test_families import SAMPLES
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
)

import tprl
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"keep_ratio": 1.7},
                r"keep_ratio must be a number in \(0, 1\], got 1\.7; use e\.g\. 0\.333\.",
            ),
            ({"keep_ratio": 0.0}, "keep_ratio must be a number"),
            ({}, "random needs a kept fraction of the visual tokens"),
            ({"threshold": 0.5}, "random was not trained with free budgets, so threshold=0.5"),
            ({"keep_ratio": 0.3, "threshold": 0.5}, "contradict each other"),
            (
                {"keep_ratio": 0.3, "positions": "gapped"},
                "positions must be keep or compact, got gapped",
            ),
        ],
    )
    def test_of_arguments(self, llava: FrozenLVLM, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            tprl.prune(llava.model, "random", **options)
        assert "generate" not in vars(llava.model)

    def test_an_unknown_pruner(self, llava: FrozenLVLM) -> None:
        with pytest.raises(
            UserError, match=r"pruner=magic does not exist; choose one of: .*random"
        ):
            tprl.prune(llava.model, "magic", keep_ratio=0.3)

    def test_a_model_without_image_tokens(self) -> None:
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20))
        with pytest.raises(
            UserError,
            match=r"GPT2LMHeadModel \(model_type gpt2\) has no image tokens that TPRL knows",
        ):
            tprl.prune(model, "random", keep_ratio=0.3)

    def test_a_pruner_for_another_width_or_family(self, llava: FrozenLVLM) -> None:
        with pytest.raises(
            UserError, match="tokens of width 192, and those of this LVLM have 48: train one for it"
        ):
            tprl.prune(llava.model, "tprl", keep_ratio=0.3)
        policy = untrained_policy(llava.width)
        policy.trained_on |= {"family": "qwen2_5_vl", "model": "Qwen"}
        with pytest.raises(
            UserError,
            match=r"trained for a qwen2_5_vl \(Qwen\), and this model is a llava: train one",
        ):
            tprl.prune(llava.model, policy, keep_ratio=0.3, processor=llava.processor)

    def test_what_the_family_cannot_provide(self) -> None:
        lvlm = load_component("model", "smolvlm2", pretrained=None, dtype="float32")
        with pytest.raises(UserError, match=r"smolvlm makes its tokens of patches on a grid"):
            tprl.prune(lvlm.model, "tome", keep_ratio=0.3)
        with pytest.raises(UserError, match=r"cannot provide \['region'\]"):
            tprl.prune(lvlm.model, "oracle", keep_ratio=0.3)

    def test_a_llava_with_a_tower_of_another_kind(self) -> None:
        vision = PixtralVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        text = LlamaConfig(**TEXT)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
        with pytest.raises(UserError, match="a vision tower of type pixtral"):
            tprl.prune(model, "random", keep_ratio=0.3)

    def test_a_policy_without_a_processor(self, llava: FrozenLVLM) -> None:
        with pytest.raises(
            UserError, match="tprl reads the question, and this model's processor is not there"
        ):
            tprl.prune(llava.model, untrained_policy(llava.width), keep_ratio=0.3)

    def test_a_model_that_is_pruned_already(self, llava: FrozenLVLM) -> None:
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            with pytest.raises(UserError, match="pruned already: call undo"):
                tprl.prune(llava.model, "random", keep_ratio=0.5)
            assert isinstance(llava.model.generate, tprl.Pruning)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_cache": False}, "packed sequences: leave the cache on"),
            ({"mm_encoder_outputs": {"image": 1}}, "images are encoded here: give pixel_values"),
            (
                {"pixel_values_videos": torch.zeros(1)},
                "pixel_values_videos.*videos are not pruned yet",
            ),
            ({"inputs_embeds": torch.zeros(1)}, "nothing to prune in embeddings"),
            ({"past_key_values": DynamicCache()}, "give the whole conversation"),
            ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ],
    )
    def test_of_what_generate_is_given(
        self, llava: FrozenLVLM, options: dict[str, Any], message: str
    ) -> None:
        batch = stock_inputs(llava, SAMPLES[:1])
        with (
            tprl.prune(llava.model, "random", keep_ratio=0.3),
            pytest.raises(UserError, match=message),
        ):
            llava.model.generate(**batch, **options)

    def test_a_checkpoint_that_leaves_the_cache_off_is_no_fault_of_the_caller(
        self, llava: FrozenLVLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As SmolVLM2's does; the answers are those with the cache on."""
        batch, options = stock_inputs(llava, SAMPLES[:1]), {"max_new_tokens": 3, "do_sample": False}
        with tprl.prune(llava.model, "divprune", keep_ratio=0.3):
            expected = llava.model.generate(**batch, **options)
            monkeypatch.setattr(llava.model.generation_config, "use_cache", False)
            assert torch.equal(llava.model.generate(**batch, **options), expected)

    def test_videos_alone_and_the_cache_of_a_pruned_prompt(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, SAMPLES[:1])
        text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            with pytest.raises(UserError, match="videos are not pruned yet"):
                llava.model.generate(**text, pixel_values_videos=torch.zeros(1))
            out = llava.model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
            with pytest.raises(UserError, match="give the whole conversation"):
                llava.model.generate(**text, past_key_values=out.past_key_values)
            with pytest.raises(UserError, match="images are encoded here"):
                llava.model.generate(**text, mm_encoder_outputs={"image": None})
            with pytest.raises(UserError, match="nothing to prune in embeddings"):
                llava.model.generate(inputs_embeds=torch.zeros(1, 3, 48))
            with pytest.raises(UserError, match="image tokens without pixel_values"):
                llava.model.generate(**text)

    def test_images_that_do_not_fit_the_prompt(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, SAMPLES[:2])
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            with pytest.raises(
                UserError, match="prompt 1 has 36 image tokens, and its images make 0"
            ):
                llava.model.generate(**batch | {"pixel_values": batch["pixel_values"][:1]})
            with pytest.raises(UserError, match="2 images were given, and the prompts show 1"):
                llava.model.generate(
                    **{key: batch[key][:1] for key in ("input_ids", "attention_mask")},
                    pixel_values=batch["pixel_values"],
                )
            with pytest.raises(UserError, match="without input_ids"):
                llava.model.generate(pixel_values=batch["pixel_values"])
