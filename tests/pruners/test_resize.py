"""A smaller image instead of fewer tokens, against the stock classes on the image scaled by
hand."""

from functools import cache
from typing import Any

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.lvlm.test_families import SAMPLES
from tests.lvlm.test_flops import WithSiglip
from tests.test_cost import counter
from torch.nn.functional import interpolate

import tprl
from tprl.bench.parity import forward, stock_inputs
from tprl.budget import budget
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry, evaluate
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.llava import Llava
from tprl.pruners.chunks import select_in_chunks
from tprl.pruners.resize import ResizePruner, fit
from tprl.scoring.flops import question_flops
from tprl.scoring.scorer import Scorer
from tprl.splice import splice

EXTRAS = ResizePruner.extras
RATIOS = (1 / 2, 1 / 3, 1 / 9, 1 / 18, 1 / 36)
GRIDS = ((24, 24), (12, 12), (27, 27), (10, 20), (20, 9), (1, 40), (40, 1), (3, 50), (1, 1), (2, 3))
PAIR = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))


def slow(name: str) -> Any:
    """A family whose kind another one shows faster."""
    return pytest.param(name, marks=pytest.mark.slow)


@cache
def family(name: str) -> FrozenLVLM:
    if name == "siglip":
        return WithSiglip(None, name="siglip", dtype="float32")
    return load_component("model", name, pretrained=None, dtype="float32", max_new_tokens=4)


def scaled(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return interpolate(image.unsqueeze(0), size, mode="bicubic", antialias=True)[0]


class TestFit:
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_it_is_the_largest_of_those_that_one_scale_rounds_to(
        self, grid: tuple[int, int]
    ) -> None:
        rows, columns = grid
        allowed = [
            (h, w)
            for h in range(1, rows + 1)
            for w in range(1, columns + 1)
            if max((h - 1) / rows, (w - 1) / columns)
            < min((h + 1) / rows, (w + 1) / columns) - 1e-12
        ]
        for ratio in (*RATIOS, 1.0):
            k = budget(ratio, rows * columns)
            h, w = fit(rows, columns, k)
            assert (h, w) in allowed
            assert h * w == max(high * wide for high, wide in allowed if high * wide <= k)
            assert fit(rows, columns, h * w) == (h, w)
        assert fit(rows, columns, rows * columns) == grid

    def test_squares(self) -> None:
        assert [fit(24, 24, k) for k in (192, 64, 32, 16)] == [(14, 13), (8, 8), (6, 5), (4, 4)]


class TestSelection:
    @pytest.mark.parametrize("ratio", RATIOS)
    def test_no_image_has_more_than_its_budget(self, ratio: float) -> None:
        encoded = toy_encoded(
            (*RAGGED, *(((rows, columns),) for rows, columns in GRIDS), ()), extras=EXTRAS
        )
        for grids, counts in zip(
            encoded.grids, ResizePruner().select(encoded, ratio).per_image(encoded), strict=True
        ):
            for (grid,), count in zip(grids, counts, strict=True):
                k = budget(ratio, grid[0] * grid[1])
                high, wide = fit(*grid, k)
                assert 1 <= high * wide == count <= k

    def test_tokens_are_those_of_the_scaled_image_and_stand_at_their_centers(self) -> None:
        encoded = toy_encoded([((6, 9), (4, 4))], extras=EXTRAS, axes=3)
        assert encoded.look is not None
        prompt = splice(encoded, ResizePruner("keep").select(encoded, 1 / 4))
        (first, second), _ = encoded.look(
            [_image(encoded, 0, 54, (3, 4)), _image(encoded, 54, 70, (2, 2))]
        )
        torch.testing.assert_close(prompt.embeds[0, prompt.visual[0]], torch.cat([first, second]))
        columns = [1, 3, 5, 7]
        cells = [r * 9 + c for r in (1, 3, 5) for c in columns] + [
            54 + r * 4 + c for r in (1, 3) for c in (1, 3)
        ]
        assert torch.equal(
            prompt.positions[:, 0, prompt.visual[0]],
            encoded.positions[:, 0, encoded.visual_at[0, cells]],
        )

    def test_compact_positions_are_those_of_the_shorter_prompt(self) -> None:
        encoded = toy_encoded(RAGGED, extras=EXTRAS)
        prompt = splice(encoded, ResizePruner().select(encoded, 1 / 9))
        assert torch.equal(prompt.positions[0], (prompt.attention.cumsum(1) - 1).clamp(min=0))

    @pytest.mark.parametrize("axes", [1, 3])
    def test_in_chunks_it_is_the_same(self, axes: int) -> None:
        encoded = toy_encoded((*RAGGED, ()), extras=EXTRAS, axes=axes)
        whole, parts = (
            ResizePruner().select(encoded, 1 / 9),
            select_in_chunks(ResizePruner(), encoded, 1 / 9, 1),
        )
        entry, other = splice(encoded, whole), splice(encoded, parts)
        torch.testing.assert_close(entry.embeds, other.embeds)
        assert torch.equal(entry.positions, other.positions)

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match=r"pruner\.positions must be compact or keep, got some"):
            ResizePruner("some")
        encoded = toy_encoded(extras=())
        with pytest.raises(UserError, match=r"no vision side \(Encoded.look\) .*: use pooling"):
            ResizePruner().select(encoded, 1 / 3)
        with pytest.raises(
            UserError, match=r"^internvl3 sees tiles of one size: .* with model\.max_tiles\."
        ):
            family("internvl3").encode(SAMPLES[:1], EXTRAS)


def _image(encoded: Any, start: int, stop: int, size: tuple[int, int]) -> torch.Tensor:
    rows, columns = encoded.grids[0][int(start > 0)][0]
    squares = encoded.extras["pixels"][0, start:stop].view(rows, columns, 3, 2, 2)
    lines = [torch.cat(list(line), -1) for line in squares]
    return scaled(torch.cat(lines, -2), (2 * size[0], 2 * size[1]))


class TestFixedGrids:
    @pytest.mark.parametrize("name", ["llava", "siglip"])
    @torch.no_grad()
    def test_values_are_those_of_the_stock_tower_on_the_scaled_image(self, name: str) -> None:
        lvlm = family(name)
        encoded, pixels = lvlm.encode([PAIR], EXTRAS), stock_inputs(lvlm, [PAIR])["pixel_values"]
        prompt = splice(encoded, ResizePruner().select(encoded, 1 / 3))
        small = torch.stack([scaled(image, (32, 24)) for image in pixels])
        out = lvlm.model.model.vision_tower(
            small, output_hidden_states=True, interpolate_pos_encoding=True
        )
        features = out.hidden_states[-2][:, int(name == "llava") :]
        expected = lvlm.model.model.multi_modal_projector(features).flatten(0, 1)
        torch.testing.assert_close(prompt.embeds[0, prompt.visual[0]], expected)
        assert prompt.embeds.std() > 0.01

    def test_pixels_are_the_processors(self) -> None:
        lvlm = family("llava")
        pixels = lvlm.encode(SAMPLES[:1], EXTRAS).extras["pixels"][0]
        expected = stock_inputs(lvlm, SAMPLES[:1])["pixel_values"][0]
        assert torch.equal(pixels[8], expected[:, 8:16, 16:24])

    def test_generate_prunes_images_of_a_prompt_and_ratio_one_is_the_stock_model(self) -> None:
        lvlm = family("llava")
        batch = [SAMPLES[0], PAIR, SAMPLES[3]._replace(images=())]
        inputs, how = stock_inputs(lvlm, batch), {"max_new_tokens": 4, "do_sample": False}
        stock = lvlm.model.generate(**inputs, **how)
        with tprl.prune(lvlm.model, "resize", keep_ratio=1 / 3) as pruning:
            ids = lvlm.model.generate(**inputs, **how)
        assert [[len(image.indices) for image in images] for images in pruning.kept] == [
            [12],
            [12, 12],
            [],
        ]
        width = inputs["input_ids"].shape[1]
        encoded = lvlm.encode(batch, EXTRAS)
        texts = lvlm.answer(splice(encoded, ResizePruner().select(encoded, 1 / 3)))
        assert lvlm.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True) == texts
        with tprl.prune(lvlm.model, "resize", keep_ratio=1.0):
            assert torch.equal(lvlm.model.generate(**inputs, **how), stock)

    def test_in_a_table_it_is_cheaper_than_random(self) -> None:
        lvlm, data = Llava("tiny_llava"), Scenes("test")
        entries = [
            Entry(name, load_component("pruner", name), (1 / 3, 1 / 36))
            for name in ("resize", "random")
        ]
        cells: dict[Any, Any] = {}
        for item in evaluate(Scorer(lvlm, data), data, entries, limit=3):
            cells[item.row.pruner, item.row.keep_ratio] = item
        assert [cells["resize", ratio].row.kept_tokens for ratio in (1 / 3, 1 / 36)] == [42, 4]
        for ratio in (1 / 3, 1 / 36):
            assert cells["resize", ratio].flops < 0.8 * cells["random", ratio].flops


class TestAnyGrid:
    @pytest.mark.parametrize("name", [slow("qwen2_vl"), "qwen2_5_vl", "qwen3_vl"])
    @torch.no_grad()
    def test_the_whole_prompt_is_the_stock_models_with_the_smaller_image(self, name: str) -> None:
        """Positions and deepstack features included; image by image, as the batch is ragged."""
        lvlm = family(name)
        encoded = lvlm.encode(SAMPLES[:3], EXTRAS)
        result = forward(lvlm, splice(encoded, ResizePruner().select(encoded, 1 / 2)))[:, -1]
        v = lvlm.model.config.vision_config
        merge, side, frames = v.spatial_merge_size, v.patch_size, v.temporal_patch_size
        for i, sample in enumerate(SAMPLES[:3]):
            inputs = stock_inputs(lvlm, [sample])
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            h, w = fit(rows // merge, columns // merge, budget(1 / 2, rows * columns // merge**2))
            # As the stock processor lays patches out, and back.
            order = inputs["pixel_values"].view(
                rows // merge, columns // merge, merge, merge, 3, frames, side, side
            )
            image = (
                order[..., 0, :, :]
                .permute(4, 0, 2, 5, 1, 3, 6)
                .reshape(3, rows * side, columns * side)
            )
            small = scaled(image, (h * merge * side, w * merge * side)).view(
                3, h, merge, side, w, merge, side
            )
            patches = (
                small.permute(1, 4, 2, 5, 0, 3, 6)
                .unsqueeze(5)
                .expand(-1, -1, -1, -1, -1, frames, -1, -1)
            )
            ids = inputs["input_ids"][0]
            start = int((ids == lvlm.image_token).nonzero()[0])
            shorter = torch.cat(
                [ids[: start + h * w], ids[start + rows * columns // merge**2 :]]
            ).unsqueeze(0)
            expected = lvlm.model(
                input_ids=shorter,
                attention_mask=torch.ones_like(shorter),
                mm_token_type_ids=(shorter == lvlm.image_token).int(),
                pixel_values=patches.reshape(h * w * merge**2, -1),
                image_grid_thw=torch.tensor([[1, h * merge, w * merge]]),
            ).logits[0, -1]
            torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=1e-5)
            assert expected.std() > 0.1


@pytest.mark.parametrize(
    "name", ["llava", slow("siglip"), slow("qwen2_vl"), slow("qwen2_5_vl"), "qwen3_vl"]
)
@torch.no_grad()
def test_flops_are_those_counted(name: str) -> None:
    """Of the vision side on the smaller images, and of the language model on their tokens."""
    lvlm, pruner = family(name), ResizePruner()
    asked = PAIR._replace(answers=("red",))
    lvlm.max_new_tokens = lvlm.answer_length("red")
    lvlm.model.generation_config.eos_token_id = None  # the answer has its full length
    encoded = lvlm.encode([asked], EXTRAS)
    with counter() as fc:
        selection = pruner.select(encoded, 1 / 3)
        lvlm.answer(splice(encoded, selection))
    (kept,) = selection.per_image(encoded)
    pruned, full = question_flops(Scorer(lvlm, Scenes("val")), encoded, 0, asked, pruner, kept)
    assert pruned == fc.get_total_flops()
    everything = [int((encoded.image_of == image).sum()) for image in (0, 1)]
    assert question_flops(Scorer(lvlm, Scenes("val")), encoded, 0, asked, pruner, everything) == (
        full,
        full,
    )
    assert pruned < full
