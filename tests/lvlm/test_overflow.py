"""Numbers that a dtype cannot hold are named with their sample, their part and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lvlm.small import SAMPLES
from tests.stages.plain import build_stage

import tprl
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.llava import Llava
from tprl.lvlm.overflow import part_of
from tprl.runtime.finite import check_logits, compact
from tprl.splice import keep_all, splice
from tprl.stages.autoencoder import AutoencoderStage

BATCH = SAMPLES[:3]
REMEDY = (
    "in float16, whose largest number is 65504: "
    r"load the model as bfloat16 or float32 \(model\.dtype"
)


@pytest.fixture(scope="module")
def half(folder: Path) -> Llava:
    return Llava(str(folder), name="toy", max_new_tokens=3, dtype="float16")


@contextmanager
def loud(module: torch.nn.Module) -> Iterator[None]:
    """While it lasts, its weights are as large as float16 allows, and finite; its outputs are
    not."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for weight in filter(torch.any, module.parameters()):  # a bias may be zero
            weight.mul_(6e4 / weight.abs().max().float()).clamp_(-6e4, 6e4)
    try:
        yield
    finally:
        module.load_state_dict(before)


def layers(lvlm: Llava) -> Any:
    return lvlm.model.model.language_model.layers


class TestParts:
    def test_projector_and_tower(self, half: Llava) -> None:
        parts = half.model.model
        block = parts.vision_tower.encoder.layers[1]
        for module, name in (
            (parts.multi_modal_projector.linear_2, "projector"),
            (block.mlp.fc2, "vision tower layer 1"),
        ):
            with (
                loud(module),
                pytest.raises(
                    UserError, match=f"its {name} is not finite for sample {BATCH[0].uid} {REMEDY}"
                ),
            ):
                half.encode(BATCH)
        assert half.encode(BATCH).embeds.isfinite().all()

    def test_language_model_as_it_reads_and_as_it_writes(self, half: Llava) -> None:
        encoded = half.encode(BATCH)
        prompt, answers = (
            splice(encoded, keep_all(encoded)),
            [sample.answers[0] for sample in BATCH],
        )
        sentence = rf"its language model layer 1 is not finite for sample scenes/val/0/\w+ {REMEDY}"
        with loud(layers(half)[1].mlp.down_proj):
            for ask in (
                half.answer,
                lambda p: half.score(p, answers),
                lambda p: half.distributions(p, answers),
            ):
                with pytest.raises(UserError, match=sentence):
                    ask(prompt)
        assert half.score(prompt, answers)[0].isfinite().all()
        assert len(half.answer(prompt)) == 3

    def test_one_sample_of_a_batch_is_named(self, half: Llava) -> None:
        encoded = half.encode(BATCH)
        encoded.embeds[1, -3] = 6e4  # its squares, sums and products leave the range
        prompt = splice(encoded, keep_all(encoded))
        prompt.embeds[1, -3] = torch.inf
        with pytest.raises(UserError, match=rf"not finite for sample {BATCH[1].uid} in float16"):
            half.score(prompt, ["a"] * 3)

    def test_weights_that_are_damaged_have_another_remedy(self, folder: Path) -> None:
        lvlm = Llava(str(folder), name="toy")
        with torch.no_grad():
            lvlm.model.model.multi_modal_projector.linear_1.weight[0, 0] = torch.nan
        sentence = (
            "projector is not finite .* because weights of .*linear_1 are not: "
            r"copy the checkpoint again\."
        )
        with pytest.raises(UserError, match=sentence):
            lvlm.encode(BATCH)

    @pytest.mark.parametrize(
        ("path", "part"),
        [
            ("model.visual.blocks.3.mlp", "vision tower layer 3"),
            ("model.visual.merger.mlp.0", "projector"),
            ("model.vision_tower.encoder.layer.0.attention", "vision tower layer 0"),
            ("model.connector.modality_projection", "projector"),
            ("model.text_model.layers.7.self_attn", "language model layer 7"),
            ("model.language_model.norm", "language model"),
            ("lm_head", "output head"),
        ],
    )
    def test_names_of_all_families(self, path: str, part: str) -> None:
        assert part_of(path) == part


class TestPrune:
    @pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}])
    def test_generate_stops(self, half: Llava, how: dict[str, Any]) -> None:
        texts = [half.render(sample) for sample in BATCH]
        images = [list(sample.images) for sample in BATCH]
        inputs = half.processor(text=texts, images=images, padding=True, return_tensors="pt")
        with tprl.prune(half.model, "divprune", keep_ratio=0.5):
            with (
                loud(layers(half)[0].mlp.down_proj),
                pytest.raises(UserError, match=r"layer 0 is .*sample prompt 0 in"),
            ):
                half.model.generate(**inputs, max_new_tokens=2, **how)
            with (
                loud(half.model.model.multi_modal_projector.linear_2),
                pytest.raises(UserError, match="its projector"),
            ):
                half.model.generate(**inputs, max_new_tokens=2, **how)
            assert len(half.model.generate(**inputs, max_new_tokens=2, **how)) == 3


class TestTraining:
    def test_policies_that_cannot_choose(self, half: Llava) -> None:
        pruner = load_component("policy", "transformer", token_width=half.width, code_width=4)
        encoded = half.encode(BATCH)
        assert pruner.select(encoded, 0.5).keep.any()
        with torch.no_grad():
            next(p for name, p in pruner.net.named_parameters() if name.endswith("weight")).fill_(
                torch.nan
            )
        with pytest.raises(
            UserError, match=r"keep logits are not finite for samples .* train it anew"
        ):
            pruner.select(encoded, 0.5)
        mask = torch.tensor([[True, False]])
        check_logits("p", torch.tensor([[0.0, torch.nan]]), mask, ["a"])

    def test_the_autoencoder_keeps_what_only_bfloat16_holds(self, folder: Path) -> None:
        large = torch.tensor([1.0, 1e5], dtype=torch.bfloat16)
        assert (compact(large).dtype, compact(large)[1].item()) == (torch.float32, large[1].item())
        assert compact(large[:1]).dtype == torch.float16
        assert not compact(torch.tensor([torch.nan])).isfinite().any()
        lvlm = Llava(str(folder), name="toy", dtype="bfloat16")
        with torch.no_grad():
            lvlm.model.model.multi_modal_projector.linear_2.weight.mul_(1e6)
        pruner = load_component("policy", "transformer", token_width=lvlm.width, code_width=4)
        stage = build_stage(
            AutoencoderStage, pruner=pruner, lvlm=lvlm, dataset=Scenes("val"), images=3
        )
        tokens = torch.cat(list(stage._tokens()))
        assert tokens.isfinite().all()
        assert tokens.abs().max() > 65504
