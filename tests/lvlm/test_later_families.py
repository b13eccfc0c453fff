"""Families that generic tests leave to the slow suite: what each has to itself, and its parity."""

from typing import Any

import pytest
import torch
from PIL import Image
from tests.lvlm.small import FIRST, families
from tests.lvlm.test_families import SAMPLES
from tests.lvlm.test_flops import sample
from tests.test_cost import counter

from tprl import cost
from tprl.bench.parity import forward, parity, stock_inputs
from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM
from tprl.splice import keep_all, splice
from tprl.types import Sample

LATER = tuple(name for name in families() if name not in FIRST)
TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))


def small(name: str, **options: Any) -> FrozenLVLM:
    return load_component(
        "model", name, pretrained=None, dtype="float32", max_new_tokens=2, **options
    )


@pytest.mark.parametrize("name", LATER)
def test_exact(name: str) -> None:
    found = parity(small(name), [SAMPLES[0], TWO], steps=2)
    assert found.keep_all <= 1e-5
    assert max(found.pruned, found.decode, found.batch) <= 1e-5
    assert found.std > 0.3
    assert found.same_ids


@pytest.mark.parametrize("name", LATER)
@torch.no_grad()
def test_the_cost_of_a_prompt(name: str) -> None:
    """Part by part, pruned and decoded: test_flops.py."""
    lvlm, asked = small(name), sample([(90, 60)])
    encoded = lvlm.encode([asked])
    visual = int(encoded.visual_mask.sum())
    text, images = int(encoded.attention.sum()) - visual, sum(encoded.tiles[0], ())
    with counter() as fc:
        lvlm.model(**stock_inputs(lvlm, [asked]), logits_to_keep=1)
    total = cost.total(lvlm.shape, text_tokens=text, visual_tokens=visual, images=images)["total"]
    assert total == fc.get_total_flops()


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
