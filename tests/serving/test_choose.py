"""What is kept of single images is what `tprl.prune` keeps of prompts."""

from typing import Any

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.tprl import TPRL
from tprl.serving.choose import Image, as_prompts, choose
from tprl.splice import splice
from tprl.types import Encoded


def images_of(encoded: Encoded) -> list[Image]:
    """The image of every prompt, with its question; each prompt has one."""
    images = []
    for row, (views,) in enumerate(encoded.grids):
        ((rows, columns),) = views
        at = encoded.visual_at[row, encoded.visual_mask[row]]
        deep = None if encoded.deep is None else encoded.deep[row, at]
        places = encoded.positions[:, row, at] - encoded.positions[:, row, at[:1]]
        words = encoded.embeds[row, encoded.question[row]]
        images.append(
            Image(encoded.embeds[row, at], (rows, columns), words, places, encoded.uids[row], deep)
        )
    return images


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.mark.parametrize(
    "name", ["tprl", "divprune", "pooling", "question_dpp", "uniform", "random", "keep_all"]
)
def test_tokens_and_places_are_those_of_the_prompt(lvlm: FrozenLVLM, name: str) -> None:
    data = Scenes("test")
    encoded = lvlm.encode([data[index] for index in (0, 1, 7)])
    pruner, ratio = load_component("pruner", name), 1.0 if name == "keep_all" else 1 / 9
    prompt = splice(encoded, pruner.select(encoded, ratio))
    kept = choose(pruner, images_of(encoded), ratio)
    for row, image in enumerate(kept):
        assert torch.equal(image.tokens, prompt.embeds[row, prompt.visual[row]])
        start = int(encoded.positions[0, row, encoded.visual_at[row, 0]])
        assert torch.equal(image.places, prompt.positions[:, row, prompt.visual[row]] - start)


def test_sizes_and_questions_may_differ_and_do_not_mix() -> None:
    """Several images of one call: each is chosen as if it were alone."""
    encoded = toy_encoded([((4, 4),), ((2, 6),), ((4, 4),)], axes=3)
    pruner: Any = TPRL(16, code_width=8, hidden=16, width=32, heads=4, select="topk").eval()
    images = images_of(encoded)
    together = choose(pruner, images, 0.25)
    assert [len(image.tokens) for image in together] == [4, 3, 4]
    for image, kept in zip(images, together, strict=True):
        (alone,) = choose(pruner, [image], 0.25)
        assert torch.equal(kept.places, alone.places)
        assert kept.places.shape[0] == 3


def test_deeper_features_go_with_their_tokens() -> None:
    tokens = torch.randn(6, 4)
    image = Image(tokens, (2, 3), torch.zeros(0, 4), torch.arange(6).unsqueeze(0), deep=tokens * 2)
    (kept,) = choose(load_component("pruner", "divprune"), [image], 0.5)
    assert kept.deep is not None
    assert torch.equal(kept.deep, kept.tokens * 2)


def test_padding_stands_before_the_words() -> None:
    places = torch.arange(4).unsqueeze(0)
    pair = [Image(torch.ones(4, 2), (2, 2), torch.ones(words, 2), places) for words in (3, 1)]
    encoded = as_prompts(pair)
    assert encoded.attention.int().tolist() == [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]
    assert encoded.question.sum(1).tolist() == [3, 1]
    assert encoded.words[1].tolist() == [[True] * 3, [True, False, False]]
