"""Encodings put together are those of one batch, and PPO goes on where encoding has no memory."""

from typing import Any

import pytest
import torch
from tests.lvlm.small import SAMPLES
from tests.stages.toy_runs import fit, ppo

from tprl.build import load_component
from tprl.scoring.joining import joined_encodings
from tprl.splice import keep_all, splice
from tprl.types import Sample

LARGE = SAMPLES[0].images[0].resize((140, 84))
# a large image, two images, and text alone: prompts and numbers of tokens differ
MIXED = (
    SAMPLES[1],
    SAMPLES[0]._replace(images=(LARGE,)),
    SAMPLES[5]._replace(images=(SAMPLES[5].images[0], LARGE)),
    SAMPLES[6]._replace(images=()),
)


def test_parts_put_together_are_the_whole() -> None:
    model = load_component("model", "qwen3_vl", pretrained=None, dtype="float32")
    extras, answers = frozenset({"cls_attention", "vision_features"}), ["red", "4", "yes", "no"]
    whole = model.encode(MIXED, extras)
    expected = model.score(splice(whole, keep_all(whole)), answers)[0]
    for cut in (1, 3):
        again = joined_encodings(
            [model.encode(MIXED[:cut], extras), model.encode(MIXED[cut:], extras)]
        )
        for name in ("uids", "grids", "tiles", "seen", "counts", "questions"):
            assert getattr(again, name) == getattr(whole, name), name
        for name in ("attention", "visual_at", "visual_mask", "image_of", "positions", "question"):
            assert torch.equal(getattr(again, name), getattr(whole, name)), name
        for name in ("visual", "deep"):
            torch.testing.assert_close(getattr(again, name), getattr(whole, name))
        for name in extras:
            torch.testing.assert_close(again.extras[name], whole.extras[name])
        score = model.score(splice(again, keep_all(again)), answers)[0]
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_ppo_halves_the_questions_that_it_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, sizes = [], list[int]()
    for room in (64, 3):
        module = ppo(iterations=1)
        model: Any = module.lvlm
        plain = model.encode

        def narrow(samples: list[Sample], *how: Any, room: int = room, plain: Any = plain) -> Any:
            sizes.append(len(samples))
            if len(samples) > room:
                raise torch.OutOfMemoryError
            return plain(samples, *how)

        monkeypatch.setattr(model, "encode", narrow)
        fit(module)
        weights.append(module.net.state_dict())
    assert min(sizes) <= 3 < max(sizes)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)
