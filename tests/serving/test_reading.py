"""A pruned prompt as an engine reads it: where images begin, and which prompts cannot be given to
it."""

from dataclasses import replace

import pytest
import torch

from tprl.errors import UserError
from tprl.serving.places import without_places
from tprl.serving.reading import engine_prompt
from tprl.types import Prompt

IMAGE, COUNT = 9, 6  # the placeholder, and tokens of an image before pruning


def prompt() -> Prompt:
    """Padding, a word, an image with 2 of 6 tokens, a word, one with 3 of 6, a word."""
    visual = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    ids = torch.where(visual, IMAGE, torch.tensor([[0, 1, 0, 0, 2, 0, 0, 0, 3]]))
    return Prompt(
        uids=("a",),
        input_ids=ids,
        embeds=torch.arange(9.0).reshape(1, 9, 1).expand(1, 9, 4).clone(),
        attention=torch.arange(9).unsqueeze(0) > 0,
        positions=torch.tensor([[[0, 0, 2, 5, 7, 8, 9, 13, 14]]]),
        visual=visual,
        image=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 0]]),
    )


def test_a_placeholder_per_image_and_places_within_it() -> None:
    ids, images = engine_prompt(prompt(), 0, COUNT)
    assert ids == [1, IMAGE, 2, IMAGE, 3]
    tokens, places = zip(*(without_places(image, 1) for image in images), strict=True)
    assert [place.tolist() for place in places] == [[[1, 4]], [[0, 1, 5]]]
    assert [token[:, 0].tolist() for token in tokens] == [[2, 3], [5, 6, 7]]


@pytest.mark.parametrize("positions", [[0, 0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 2, 5, 6, 8, 9, 13, 14]])
def test_positions_that_are_not_those_of_the_whole_prompt(positions: list[int]) -> None:
    moved = replace(prompt(), positions=torch.tensor([[positions]]))
    with pytest.raises(UserError, match="whose survivors keep their places: use positions=keep"):
        engine_prompt(moved, 0, COUNT)


def test_another_count_of_tokens_is_another_prompt() -> None:
    with pytest.raises(UserError, match="keep their places"):
        engine_prompt(prompt(), 0, COUNT + 1)


def test_images_without_text_between_them() -> None:
    """An engine would take them for one image, and give the second one the places of the first."""
    visual, image = (
        torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]]),
        torch.tensor([[0] * 4 + [1] * 4 + [0]]),
    )
    neighbors = replace(prompt(), visual=visual.bool(), image=image)
    with pytest.raises(
        UserError,
        match=r"images of this prompt follow each other: write a space .*model\.prompt\.$",
    ):
        engine_prompt(neighbors, 0, COUNT)
