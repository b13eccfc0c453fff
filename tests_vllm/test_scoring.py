"""The engine's likelihoods of answers are those of `FrozenLVLM.score`, whatever tokens are kept."""

from pathlib import Path

import pytest
import torch
from tests_vllm.engines import ENGINE, export, questions

from tprl.build import load_component
from tprl.errors import UserError
from tprl.splice import splice


def test_likelihoods_are_equal(tmp_path: Path) -> None:
    lvlm = load_component("model", "tiny_llava")
    folder = export(tmp_path, lvlm, "keep_all", 1.0)
    from tprl.serving.vllm.scoring import EngineReading

    engine = EngineReading(lvlm, folder, **ENGINE)
    samples = questions(20, 300)
    encoded, answers = lvlm.encode(samples), [sample.answers[0] for sample in samples]
    for name, ratio in (("random", 1 / 9), ("tprl", 1 / 3), ("keep_all", 1.0)):
        prompt = splice(encoded, load_component("pruner", name).select(encoded, ratio))
        ours, theirs = lvlm.score(prompt, answers), engine.score(prompt, answers)
        assert torch.allclose(ours[0], theirs[0], atol=1e-4), (ours[0] - theirs[0]).abs().max()
        assert torch.equal(ours[1], theirs[1])
    compact = splice(encoded, load_component("pruner", "random").select(encoded, 1 / 9), "compact")
    # it can fail
    assert (lvlm.score(compact, answers)[0] - lvlm.score(prompt, answers)[0]).abs().max() > 1e-3
    with pytest.raises(UserError, match="whose survivors keep their places: use positions=keep"):
        engine.score(compact, answers)
