"""Which ids of a prompt are its question, as `tprl.prune` finds them."""

from collections.abc import Sequence
from typing import Any

import torch

from tprl.lvlm.questions import QuestionFinder


class Questions:
    """Finds the question's ids in a prompt's ids, whose images are not expanded yet.

    Args:
        processor: with the chat template of the served model.
        image_token: id of the placeholder.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, processor: Any, image_token: int) -> None:
        self._find = QuestionFinder(processor, image_token)

    def __call__(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids of the question, in order; () in a prompt without an image, or of placeholders alone,
        as engines make them to measure memory."""
        if self._find.special.issuperset(ids):
            return ()
        line = torch.as_tensor(ids, dtype=torch.long).unsqueeze(0)
        question = self._find(line, torch.ones_like(line, dtype=torch.bool))
        return tuple(line[question].tolist())
