"""Extras of every family against the attention weights that the stock eager attention really
used."""

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.lvlm.small import FIRST, half_on_disk
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from tprl.budget import budget
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm import towers
from tprl.lvlm.frozen import FrozenLVLM
from tprl.types import Encoded, Sample

EXTRAS = frozenset({"cls_attention", "vision_features"})
SIZES = ((96, 96), (150, 90), (60, 120), (220, 150))  # width x height
SAMPLES = [
    sample._replace(images=(sample.images[0].resize(size, Image.Resampling.BILINEAR),))
    for sample, size in zip((Scenes("val")[i] for i in (0, 5, 10, 11)), SIZES, strict=True)
]

# Where the features are made, written down by hand for the small models.
LAYERS: dict[str, Callable[[Any], Any]] = {
    "internvl3": lambda parts: parts.vision_tower.encoder.layer[1].attention,
    "smolvlm2": lambda parts: parts.vision_model.encoder.layers[1].self_attn,
    "qwen2_5_vl": lambda parts: parts.visual.blocks[1].attn,
    "qwen2_vl": lambda parts: parts.visual.blocks[2].attn,
    "qwen3_vl": lambda parts: parts.visual.blocks[2].attn,
    "llava_next": lambda parts: parts.vision_tower.encoder.layers[1].self_attn,
    "llava_onevision": lambda parts: parts.vision_tower.encoder.layers[2].self_attn,
    "gemma3": lambda parts: parts.vision_tower.encoder.layers[2].self_attn,
    "gemma4": lambda parts: parts.vision_tower.encoder.layers[1].self_attn,
    "qwen3_5": lambda parts: parts.visual.blocks[2].attn,
    "mistral3": lambda parts: parts.vision_tower.transformer.layers[1].attention,
    "glm4v": lambda parts: parts.visual.blocks[2].attn,
}
WITH_CLS = ("internvl3", "llava_next")


def make(name: str, **options: Any) -> FrozenLVLM:
    return load_component("model", name, pretrained=None, dtype="float32", **options)


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n in FIRST else pytest.mark.slow) for n in LAYERS],
)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return make(request.param)


@pytest.fixture(scope="module")
def eager(lvlm: FrozenLVLM) -> FrozenLVLM:
    return make(lvlm.name, attention="eager")


@pytest.fixture(scope="module")
def encoded(lvlm: FrozenLVLM) -> Encoded:
    return lvlm.encode(SAMPLES, EXTRAS)


def real_weights(
    eager: FrozenLVLM, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Attention weights [I H N N] of the layer, call by call, as the stock eager attention computes
    them."""
    layer = LAYERS[eager.name](eager.model.model)
    module, result = sys.modules[type(layer).__module__], []
    stock = module.eager_attention_forward

    def spy(which: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out, weights = stock(which, *args, **kwargs)
        if which is layer:
            result.append(weights)
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    run()
    monkeypatch.undo()
    return result


def from_cls(weights: Tensor) -> list[float]:
    """One tile's [H N N] -> per patch."""
    heads, count, _ = weights.shape
    return [sum(float(weights[h, 0, j]) for h in range(heads)) / heads for j in range(1, count)]


def received(weights: Tensor, asking: list[int] | None = None) -> list[float]:
    heads, count, _ = weights.shape
    rows = list(range(count)) if asking is None else asking
    return [
        float(sum(weights[h, i, j] for h in range(heads) for i in rows)) / heads / len(rows)
        for j in range(count)
    ]


def shuffled(patches: list[float], side: int) -> list[float]:
    """A tile's patches in raster order -> its tokens in raster order, each the mean of a 2x2
    square."""
    return [
        sum(patches[(2 * r + i) * side + 2 * c + j] for i, j in product(range(2), range(2))) / 4
        for r, c in product(range(side // 2), range(side // 2))
    ]


def window_places(rows: int, columns: int, size: int) -> list[int]:
    """Which token (in raster order) stands at each place of a tower with windows."""
    return [
        r * columns + c
        for top, left in product(range(0, rows, size), range(0, columns, size))
        for r, c in product(
            range(top, min(top + size, rows)), range(left, min(left + size, columns))
        )
    ]


def merged(eager: FrozenLVLM, patches: list[float], view: tuple[int, int]) -> list[float]:
    """Qwen: four patches in a row are a token; Qwen2.5-VL's tower orders tokens by windows of
    2x2."""
    tokens = [sum(patches[i : i + 4]) / 4 for i in range(0, len(patches), 4)]
    if eager.name != "qwen2_5_vl":
        return tokens
    out = [0.0] * len(tokens)
    for place, token in enumerate(window_places(*view, 2)):
        out[token] = tokens[place]
    return out


def squares(patches: list[float], view: tuple[int, int]) -> list[float]:
    """Mistral 3: patches in raster order -> tokens in raster order, each the mean of a 2x2
    square."""
    across = 2 * view[1]
    return [
        sum(patches[(2 * r + i) * across + 2 * c + j] for i, j in product(range(2), range(2))) / 4
        for r, c in product(range(view[0]), range(view[1]))
    ]


def cropped(
    crops: list[list[float]],
    sample: Sample,
    views: tuple[tuple[int, int], ...],
    pinpoints: list[list[int]],
) -> list[float]:
    """LLaVA-NeXT: the small view, then what is no padding of the crops, which are 3x3 patches
    each."""
    size = (sample.images[0].height, sample.images[0].width)
    height, width = select_best_resolution(size, pinpoints)
    grid = (height // 8, width // 8)
    top, left = ((full - kept) // 2 for full, kept in zip(grid, views[1], strict=True))
    across = width // 24
    return crops[0] + [
        crops[1 + y // 3 * across + x // 3][y % 3 * 3 + x % 3]
        for y, x in product(range(top, top + views[1][0]), range(left, left + views[1][1]))
    ]


def expected(eager: FrozenLVLM, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    calls = real_weights(eager, lambda: eager.encode([sample]), monkeypatch)
    views = eager.encode([sample]).grids[0][0]
    assert len(calls) == 1
    match eager.name:
        case "internvl3":
            return [value for tile in calls[0] for value in shuffled(from_cls(tile), 6)]
        case "smolvlm2" | "gemma3":
            return [value for tile in calls[0] for value in shuffled(received(tile), 6)]
        case "gemma4":  # padding behind the patches neither asks nor receives
            real = 4 * views[0][0] * views[0][1]
            return squares(received(calls[0][0][:, :real, :real]), views[0])
        case "mistral3":
            return squares(received(calls[0][0]), views[0])
        case "llava_next":
            crops = [from_cls(tile) for tile in calls[0]]
            return cropped(crops, sample, views, [[24, 48], [48, 24], [48, 48]])
        case "llava_onevision":
            crops = [received(tile) for tile in calls[0]]
            return cropped(crops, sample, views, [[24, 24], [24, 48], [48, 24], [48, 48]])
    return merged(eager, received(calls[0][0]), views[0])


@pytest.mark.parametrize("i", range(len(SAMPLES)))
def test_cls_attention_is_what_eager_attention_uses(
    lvlm: FrozenLVLM, eager: FrozenLVLM, encoded: Encoded, i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = torch.tensor(expected(eager, SAMPLES[i], monkeypatch))
    result = encoded.extras["cls_attention"][i][encoded.visual_mask[i]]
    assert torch.allclose(result, reference, atol=1e-6)
    # tokens differ, so that another order would be seen
    assert reference.std() > 1e-3 * reference.mean()
    assert not torch.allclose(result.flip(0), reference, atol=1e-5)


def test_attention_sums_to_what_it_must(
    lvlm: FrozenLVLM, eager: FrozenLVLM, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a query gives sums to 1: to patches, and by the CLS token to itself. Tokens are
    means of 4 patches."""
    for i, sample in enumerate(SAMPLES):
        values = encoded.extras["cls_attention"][i][encoded.visual_mask[i]]
        views = values.split([rows * columns for rows, columns in encoded.grids[i][0]])
        (weights,) = real_weights(eager, lambda sample=sample: eager.encode([sample]), monkeypatch)
        itself = weights[:, :, 0, 0].mean(1) if lvlm.name in WITH_CLS else torch.zeros(len(weights))
        if lvlm.name in ("llava_next", "llava_onevision"):  # padding leaves the crops
            views, itself, patches = views[:1], itself[:1], 1
        else:
            patches = 4
        result = torch.stack([patches * view.sum() for view in views])
        assert torch.allclose(result + itself, torch.ones(len(views)), atol=1e-5)


def test_the_projector_on_vision_features_makes_the_tokens(
    lvlm: FrozenLVLM, encoded: Encoded
) -> None:
    features = encoded.extras["vision_features"]
    result = lvlm.project(features)
    assert result.shape == encoded.visual.shape
    assert torch.allclose(
        result[encoded.visual_mask], encoded.visual[encoded.visual_mask], atol=1e-5
    )
    assert torch.allclose(lvlm.project(features[0, 1]), result[0, 1], atol=1e-5)
    assert lvlm.project(features[:, :0]).shape == (len(SAMPLES), 0, lvlm.width)
    assert encoded.visual[encoded.visual_mask].std() > 0.1


def test_a_batch_is_its_samples_alone(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    for i, sample in enumerate(SAMPLES):
        alone = lvlm.encode([sample], EXTRAS)
        for name in EXTRAS:
            assert torch.allclose(
                encoded.extras[name][i][encoded.visual_mask[i]], alone.extras[name][0], atol=1e-5
            )
            assert not encoded.extras[name][i][~encoded.visual_mask[i]].any()


def test_extras_of_two_images_stand_at_their_tokens(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    if lvlm.by_company:
        pytest.skip("it sees an image among others otherwise: test_later_families.py")
    chat = make(lvlm.name, prompt=None)
    pair = SAMPLES[0]._replace(images=(SAMPLES[3].images[0], SAMPLES[1].images[0]))
    result = chat.encode([SAMPLES[2], pair], EXTRAS)
    for name in EXTRAS:
        alone = torch.cat([encoded.extras[name][i][encoded.visual_mask[i]] for i in (3, 1)])
        assert torch.allclose(result.extras[name][1][result.visual_mask[1]], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["cls_attention", "vispruner"])
def test_published_selectors_run_with_exact_budgets(lvlm: FrozenLVLM, name: str) -> None:
    pruner = load_component("pruner", name)
    encoded = lvlm.encode(SAMPLES, pruner.extras)
    assert set(encoded.extras) == pruner.extras
    counts = encoded.visual_mask.sum(1).tolist()
    assert pruner.select(encoded, 1 / 3).count.tolist() == [
        budget(1 / 3, count) for count in counts
    ]


def test_extras_do_not_change_the_tokens_and_leave_no_hooks(
    lvlm: FrozenLVLM, encoded: Encoded
) -> None:
    assert torch.equal(lvlm.encode(SAMPLES).embeds, encoded.embeds)
    assert not any(module._forward_pre_hooks for module in lvlm.model.modules())


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_model_spread_over_memory_and_disk_gives_the_same(
    lvlm: FrozenLVLM, encoded: Encoded, tmp_path: Path
) -> None:
    if lvlm.name == "gemma4":
        pytest.skip("refused: its word embeddings must be where prompts are")
    spread = half_on_disk(lvlm, tmp_path)
    result = spread.encode(SAMPLES, EXTRAS)
    for name in EXTRAS:
        assert torch.allclose(result.extras[name], encoded.extras[name], atol=1e-6)


def test_internvls_norm_of_queries_and_keys_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, eager = make("internvl3"), make("internvl3", attention="eager")
    draw = torch.Generator().manual_seed(0)
    for attribute in ("q_norm", "k_norm"):
        norm = nn.LayerNorm(32)
        norm.weight = nn.Parameter(torch.rand(32, generator=draw) * 3)
        for lvlm in (plain, eager):
            setattr(LAYERS[lvlm.name](lvlm.model.model), attribute, norm)
    reference = torch.tensor(expected(eager, SAMPLES[0], monkeypatch))
    result = plain.encode(SAMPLES[:1], EXTRAS).extras["cls_attention"][0]
    assert torch.allclose(result, reference, atol=1e-6)
    assert not torch.allclose(
        result, make("internvl3").encode(SAMPLES[:1], EXTRAS).extras["cls_attention"][0]
    )


def test_padded_patches_of_smolvlm_neither_ask_nor_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, eager = make("smolvlm2"), make("smolvlm2", attention="eager")
    images = list(SAMPLES[0].images)
    inputs = plain.processor(text="<image>" * len(images), images=[images], return_tensors="pt")
    pixels = dict(plain.pixels_of(inputs))
    pixels["pixel_attention_mask"] = pixels["pixel_attention_mask"].clone()
    # of 24: the fourth row of patches is seen in part
    pixels["pixel_attention_mask"][:, 1, 13:] = 0
    pixels["pixel_attention_mask"][:, 1, :, 8:] = 0
    asking = [r * 6 + c for r in range(4) for c in range(2)]
    (weights,) = real_weights(eager, lambda: eager.see(pixels, frozenset()), monkeypatch)
    reference = shuffled(received(weights[1], asking), 6)
    (result,) = plain.see(pixels, EXTRAS).extras["cls_attention"]
    assert torch.allclose(result[9:18], torch.tensor(reference), atol=1e-6)
    assert (result[9:18] > 0).tolist() == [True, False, False] * 2 + [False] * 3
    assert abs(4 * float(result[9:18].sum()) - 1) < 1e-5


@pytest.mark.parametrize(
    "setting", [{"vision_feature_layer": [-2, -1]}, {"vision_feature_select_strategy": "full"}]
)
def test_features_of_llava_next_that_are_not_known_are_refused(setting: dict[str, Any]) -> None:
    lvlm = make("llava_next")
    lvlm.model.config.update(setting)
    with pytest.raises(
        UserError,
        match=r"llava_next cannot provide \['cls_attention'\]: it reads features of layer",
    ):
        lvlm.encode(SAMPLES, frozenset({"cls_attention"}))


def test_every_extra_that_is_not_known_is_refused(lvlm: FrozenLVLM) -> None:
    with pytest.raises(UserError, match=r"cannot provide \['keys'\]"):
        lvlm.encode(SAMPLES, frozenset({"keys"}))


class TestTowers:
    def test_attention_in_chunks_is_attention_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        query, keys = torch.randn(2, 2, 3, 11, 4, generator=draw)
        real = torch.rand(2, 11, generator=draw) < 0.7
        for mask in (None, real):
            once = towers.received_attention(query, keys, mask)
            monkeypatch.setattr(towers, "CHUNK", 2 * 3 * 11 * 4)
            assert torch.allclose(towers.received_attention(query, keys, mask), once, atol=1e-6)
            monkeypatch.undo()
            assert torch.allclose(once.sum(1), torch.ones(2), atol=1e-6)

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_windows(self, size: int) -> None:
        views = [(3, 5), (8, 8), (1, 7), (4, 2)]
        result = towers.window_order(views, size).split([rows * columns for rows, columns in views])
        start = 0
        for (rows, columns), order in zip(views, result, strict=True):
            assert (order - start).tolist() == window_places(rows, columns, size)
            start += rows * columns

    @pytest.mark.parametrize(("feature", "layer"), [(-1, 23), (-2, 22), (24, 23), (23, 22)])
    def test_the_layer_of_a_feature(self, feature: int, layer: int) -> None:
        assert towers.layer_of(feature, 24) == layer
