"""What parity compares: answers up to their end, whatever tokens end them, and never nothing."""

import pytest
import torch

from tprl.bench.parity import _generate, _real, parity, varied
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.random import RandomPruner
from tprl.splice import splice

SAMPLES = varied([Scenes("val")[i] for i in range(3)])


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")


def test_any_of_several_tokens_may_end_an_answer(lvlm: FrozenLVLM) -> None:
    """Llama 3 and others name a list; what is decoded after one of them is padding, which nothing
    predicts."""
    usual = lvlm.model.generation_config.eos_token_id
    encoded = lvlm.encode(SAMPLES)
    ids, _ = _generate(lvlm, splice(encoded, RandomPruner().select(encoded, 0.4)), 3)
    early = int(ids[0, 1])
    assert early not in ids[1:]
    lvlm.model.generation_config.eos_token_id = [usual, early]
    try:
        gaps = parity(lvlm, SAMPLES)
    finally:
        lvlm.model.generation_config.eos_token_id = usual
    assert gaps.same_ids
    assert gaps.decode <= 1e-5


def test_padding_begins_after_the_first_end() -> None:
    ids = torch.tensor([[5, 7, 0, 0], [5, 3, 7, 0], [5, 5, 5, 5]])
    assert _real(ids, [7, 3]).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True] * 4,
    ]
    assert _real(ids, []).all()


def test_nothing_to_compare_is_refused(lvlm: FrozenLVLM) -> None:
    with pytest.raises(UserError, match="none of the 0 questions has an image"):
        parity(lvlm, [])
    with pytest.raises(
        UserError, match=r"none of the 1 questions has an image, .*: use a dataset with images"
    ):
        parity(lvlm, [SAMPLES[0]._replace(images=())])
