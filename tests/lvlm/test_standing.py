"""What stands in for a CLS token, for keys of the last layer and for CLIP's text tower."""

from typing import Any

import pytest
import torch
from tests.lvlm.test_extras import LAYERS, SAMPLES, WITH_CLS, make
from tests.lvlm.test_flops import sample
from tests.test_cost import counter
from torch import Tensor

from tprl.budget import budget
from tprl.build import load_component
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry, feasible
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.standing import EVERY, keys_of, object_layer
from tprl.splice import splice

SUBSTITUTED = ("visionzip", "prumerge", "prumerge_plus", "hiprune", "cdpruner", "trim")
QUICK = ("qwen2_5_vl", "internvl3")  # without a CLS token, in windows, and with one, in tiles


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in LAYERS],
)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return make(request.param)


def test_rules_made_for_llava_run_with_exact_budgets_and_a_star(lvlm: FrozenLVLM) -> None:
    assert lvlm.known_extras - {"pixels", "rgb"} == EVERY
    assert EVERY - lvlm.substitutes.keys() - {"vision_features"} == (
        {"cls_attention"} if lvlm.name in WITH_CLS else set()
    )
    for name in SUBSTITUTED:
        pruner = load_component("pruner", name)
        encoded = lvlm.encode(SAMPLES[:2], pruner.extras)
        assert set(encoded.extras) == pruner.extras
        selection = pruner.select(encoded, 1 / 3)
        counts = encoded.visual_mask.sum(1).tolist()
        assert selection.count.tolist() == [budget(1 / 3, count) for count in counts]
        assert lvlm.score(splice(encoded, selection), ["red", "no"])[0].isfinite().all()
        assert [one.name for one in feasible([Entry(name, pruner, (0.3,))], lvlm)] == [f"{name}*"]


def test_keys_stand_at_their_tokens(lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes the way that keys take: with a key's first number in its place both agree."""

    def first_number(layer: Any, call: Any, *_: Any) -> Tensor:
        keys = keys_of(layer, call.x)[..., 0]
        keys = keys[0] if lvlm.name == "mistral3" else keys
        return keys[:, 1:] if lvlm.name in WITH_CLS else keys

    if lvlm.name == "gemma3":
        monkeypatch.setattr("tprl.lvlm.gemma3.received_attention", lambda _, keys: keys[:, 0, :, 0])
    else:
        monkeypatch.setattr(lvlm, "_attention", first_number)
    extras = lvlm.encode(SAMPLES, frozenset({"cls_attention", "last_keys", "vision_keys"})).extras
    torch.testing.assert_close(extras["last_keys"][..., 0], extras["cls_attention"])
    assert extras["cls_attention"].std() > 1e-3
    # [B V heads c], mean over heads
    heads = extras["last_keys"].unflatten(-1, (-1, extras["vision_keys"].shape[-1]))
    assert heads.shape[2] == lvlm.shape.vision.heads
    torch.testing.assert_close(heads.mean(2), extras["vision_keys"])


def test_the_summary_of_an_image_is_its_mean_by_attention(lvlm: FrozenLVLM) -> None:
    names = frozenset({"cls_feature", "cls_attention", "vision_features", "last_attention"})
    extras = lvlm.encode(SAMPLES[:1], names).extras
    share = extras["cls_attention"][0] / extras["cls_attention"][0].sum()
    mean = sum(w * x for w, x in zip(share, extras["vision_features"][0], strict=True))
    torch.testing.assert_close(extras["cls_feature"][0, 3], mean, atol=1e-5, rtol=1e-4)
    assert torch.equal(extras["last_attention"], extras["cls_attention"])


@torch.no_grad()
def test_what_merging_costs(lvlm: FrozenLVLM) -> None:
    for name in ("visionzip", "prumerge"):
        pruner = load_component("pruner", name)
        encoded = lvlm.encode([sample([(100, 100)])], pruner.extras)
        kept = budget(1 / 3, tokens := int(encoded.visual_mask.sum()))
        with counter() as fc:
            pruner.select(encoded, 1 / 3)
        assert fc.get_total_flops() == pruner.flops(lvlm.shape, tokens, kept)


def test_relevance_is_minus_the_cosine_to_the_words(lvlm: FrozenLVLM) -> None:
    encoded = lvlm.encode(SAMPLES[:2], frozenset({"clip_relevance"}))
    relevance = encoded.extras["clip_relevance"]
    for b in range(2):
        words = encoded.embeds[b][encoded.question[b]]
        tokens = encoded.visual[b][encoded.visual_mask[b]]
        for token, value in zip(tokens[:3], relevance[b], strict=False):
            cosines = [torch.cosine_similarity(token, word, dim=0) for word in words]
            assert float(value) == pytest.approx(-float(sum(cosines)) / len(cosines), abs=1e-5)
    assert not relevance[~encoded.visual_mask].any()


def test_unavailable_extras_are_refused(lvlm: FrozenLVLM) -> None:
    with pytest.raises(UserError, match="makes its tokens of patches on a grid, by squares that"):
        lvlm.encode(SAMPLES[:1], frozenset({"patch_embeds"}))
    if "pixels" not in lvlm.known_extras:
        with pytest.raises(UserError, match=r"no image can be scaled to fewer tokens; use another"):
            lvlm.encode(SAMPLES[:1], frozenset({"pixels"}))


def test_the_object_layer() -> None:
    assert object_layer(range(24)) == 9
    assert object_layer([7, 15, 23, 31]) == 15
    assert object_layer([4]) == 4
