"""ToMe in the towers of stock models: nothing merged changes nothing, and merging is cheaper."""

import logging
from typing import Any

import pytest
import torch
from tests.lvlm.small import TEXT, TOWER
from tests.lvlm.test_families import SAMPLES
from tests.test_cost import counter
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import tprl
from tprl import cost
from tprl.bench.parity import stock_inputs
from tprl.budget import budget
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry, evaluate
from tprl.lvlm.llava import Llava
from tprl.pruners.bipartite import merged_tower
from tprl.pruners.tome import ToMePruner
from tprl.scoring.scorer import Scorer
from tprl.types import TowerBlock

EXTRAS = ToMePruner.extras


def random_llava() -> Llava:
    return load_component("model", "llava", pretrained=None, dtype="float32", max_new_tokens=4)


def tiny_llava() -> Llava:
    return Llava("tiny_llava")


def siglip() -> Llava:
    text = LlamaConfig(**TEXT)
    vision = SiglipVisionConfig(**TOWER | {"num_hidden_layers": 4}, image_size=48)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=63,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for weight in model.model.vision_tower.parameters():
        weight.data.mul_(2 if weight.ndim > 1 else 1)
    wrapped = Llava.around(model)
    assert isinstance(wrapped, Llava)
    return wrapped


class TestOnTheStockModel:
    @pytest.mark.parametrize(
        "make", [random_llava, tiny_llava, siglip], ids=["llava", "tiny_llava", "siglip"]
    )
    @torch.no_grad()
    def test_without_merging_the_tower_run_again_gives_the_stock_features(self, make: Any) -> None:
        lvlm = make()
        size = lvlm.model.config.vision_config.image_size
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        stock: Any = lvlm.model.model.get_image_features(pixels)
        seen = lvlm.see({"pixel_values": pixels}, EXTRAS)
        start = torch.stack(seen.extras["patch_embeds"])
        mask = torch.ones(start.shape[:2], dtype=torch.bool)
        tokens = merged_tower(
            seen.tower, start, mask, torch.zeros(2, len(seen.tower.blocks), dtype=torch.long)
        )
        result = lvlm.project(tokens.x[:, int(seen.tower.cls is not None) :])
        torch.testing.assert_close(
            result, torch.stack(list(stock.pooler_output)), atol=1e-5, rtol=1e-5
        )
        assert len(seen.tower.blocks) == lvlm.model.config.vision_config.num_hidden_layers - 1
        assert all(isinstance(block, TowerBlock) for block in seen.tower.blocks)
        assert (seen.tower.cls is None) == (make is siglip)

    @torch.no_grad()
    def test_a_siglip_tower_merges_without_cls(self) -> None:
        lvlm = siglip()
        seen = lvlm.see({"pixel_values": torch.randn(1, 3, 48, 48)}, EXTRAS)
        assert seen.tower is not None
        start, mask = torch.stack(seen.extras["patch_embeds"]), torch.ones(1, 36, dtype=torch.bool)
        tokens = merged_tower(seen.tower, start, mask, torch.tensor([[18, 9, 5]]))
        assert (tokens.size > 0).sum() == 4
        assert tokens.size.sum() == 36

    @pytest.mark.parametrize("strategy", ["default", "full"])
    def test_visual_tokens_that_are_not_the_patches_are_refused(self, strategy: str) -> None:
        lvlm = random_llava() if strategy == "full" else siglip()
        lvlm.model.config.vision_feature_select_strategy = strategy
        with pytest.raises(
            UserError, match=rf"by '{strategy}', so its visual tokens are not all patches"
        ):
            lvlm.see({"pixel_values": torch.zeros(1, 3, 48, 48)}, EXTRAS)

    def test_other_families_cannot_provide_it(self) -> None:
        other = load_component("model", "internvl3", pretrained=None, dtype="float32")
        with pytest.raises(UserError, match="patches that merge inside the tower leave no grid"):
            other.encode(SAMPLES[:1], EXTRAS)

    @pytest.mark.parametrize("make", [random_llava, tiny_llava], ids=["llava", "tiny_llava"])
    def test_prune_generates(self, make: Any) -> None:
        lvlm = make()
        pair = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
        batch = (
            [SAMPLES[0], pair, SAMPLES[3]._replace(images=())]
            if make is random_llava
            else SAMPLES[:2]
        )
        inputs = stock_inputs(lvlm, batch)
        stock = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with tprl.prune(lvlm.model, "tome", keep_ratio=1 / 3) as pruning:
            result = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        width = inputs["input_ids"].shape[1]
        assert torch.equal(result[:, :width], stock[:, :width])
        assert result.shape[1] > width
        for sample, images in zip(batch, pruning.kept, strict=True):
            assert [len(item.indices) for item in images] == [
                budget(1 / 3, item.total) for item in images
            ]
            assert len(images) == len(sample.images)
        with tprl.prune(lvlm.model, "tome", keep_ratio=1.0):
            result = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(result, stock)

    def test_flops_are_those_counted_in_the_stock_blocks(self) -> None:
        lvlm = random_llava()
        encoded, shape = lvlm.encode(SAMPLES[:1], EXTRAS), lvlm.shape
        for kept in (35, 20, 12, 9):
            with counter() as fc, torch.no_grad():
                ToMePruner().select(encoded, kept / 36)
            full = shape.vision.used * cost.encoder_layer_flops(
                shape.vision.width, shape.vision.mlp, 37
            )
            flops = ToMePruner().flops(shape, 36, kept)
            assert fc.get_total_flops() == full + cost.projector_flops(shape) + flops
            assert flops < 0
        assert ToMePruner().flops(shape, 36, 36) == 0

    def test_in_a_table_it_is_cheaper_than_random_and_ratios_out_of_reach_are_left_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        lvlm, data = Llava("tiny_llava"), Scenes("test")
        entries = [
            Entry("keep_all", load_component("pruner", "keep_all"), (1.0,)),
            Entry("tome", ToMePruner(), (1 / 3, 1 / 9, 1 / 48)),
            Entry("random", load_component("pruner", "random"), (1 / 3, 1 / 9)),
            Entry("published", ToMePruner(published=True), (None,)),
        ]
        with caplog.at_level(logging.INFO):
            answered = evaluate(Scorer(lvlm, data), data, entries, limit=8)
        assert [record.message for record in caplog.records if "left out" in record.message] == [
            (
                "left out: tome at most halves the tokens in each of 5 "
                "blocks, which leaves 5 of 144: keeping "
                "3 is infeasible, give a keep_ratio of at least 0.0347."
            )
        ]
        cells: dict[tuple[str, float | None], Any] = {
            (item.row.pruner, item.row.keep_ratio): item for item in answered
        }
        assert ("tome", 1 / 48) not in cells
        for ratio in (1 / 3, 1 / 9):
            assert (
                cells["tome", ratio].row.kept_tokens
                == cells["random", ratio].row.kept_tokens
                == budget(ratio, 144)
            )
            assert (
                cells["tome", ratio].flops
                < cells["random", ratio].flops
                < cells["keep_all", 1.0].flops
            )
        assert cells["published", None].row.kept_tokens == 144 - 5 * 16
