"""Prune here, and send what is kept as embeddings to any vLLM that takes them
(`--enable-mm-embeds`).

Nothing has to be installed where the engine runs, and the engine cannot know where survivors stood:
it numbers them one after the other (`positions="compact"`). In a trial with the embedded model at
1/9 of the tokens, counting questions fell from 19 right of 20 to 13 that way, and boxes were
malformed; the plugin (docs/serving.md) keeps positions.
"""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tprl.api import prune
from tprl.errors import UserError
from tprl.pruners.learned import LearnedPruner
from tprl.serving.settings import check_servable
from tprl.splice import splice
from tprl.types import Pruner

log = logging.getLogger(__name__)
COST = (
    "positions are compact in what an engine makes of embeddings: answers that depend "
    "on where things are suffer (docs/serving.md); the vLLM plugin keeps positions"
)
_said: set[str] = set()


@torch.no_grad()
def pruned_embeds(
    model: Any,
    pruner: Pruner | LearnedPruner | str,
    keep_ratio: float,
    inputs: Mapping[str, Tensor],
    processor: Any = None,
) -> list[list[Float[Tensor, "K D"]]]:
    """Kept visual tokens of every prompt, image by image, as the language model would read them.

    Args:
        model: a stock model; its language model does not run.
        pruner, keep_ratio, processor: see `tprl.prune`.
        inputs: what the model's processor returns for texts and images.

    Raises:
        UserError: as `tprl.prune`, a pruner that cannot be served, or a model whose deeper layers
            read images too.
    """
    # The handle serves as a checked view of the model: its `generate` is never called.
    with prune(model, pruner, keep_ratio, processor=processor, positions="compact") as pruning:
        chooser = pruning.pruner
        check_servable(chooser)
        assert isinstance(chooser, Pruner)  # the others are refused above
        ids = inputs["input_ids"].to(pruning.lvlm.device)
        encoded = pruning.encode(ids, inputs)
        if encoded.deep is not None:
            raise UserError(
                f"{pruning.lvlm.name} gives deeper layers features of images too, "
                "which embeddings do not carry: serve it with the vLLM plugin."
            )
        prompt = splice(encoded, chooser.select(encoded, pruning.keep_ratio), "compact")
    if COST not in _said:
        _said.add(COST)
        log.warning(COST)
    embeds = []
    for row, grids in enumerate(encoded.grids):
        # An engine takes embeddings image by image.
        visual, image_of = prompt.visual[row], prompt.image[row]
        kept = [visual & (image_of == image) for image in range(len(grids))]
        embeds.append([prompt.embeds[row, columns] for columns in kept])
    return embeds


def content(embeds: Float[Tensor, "K D"]) -> dict[str, Any]:
    """An image's part of a chat message to vLLM's OpenAI server: numpy's file format in base64, no
    pickle."""
    buffer = io.BytesIO()
    np.save(buffer, embeds.float().cpu().numpy(), allow_pickle=False)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}


def message(question: str, images: Sequence[Float[Tensor, "K D"]]) -> dict[str, Any]:
    """A user's turn for `client.chat.completions.create(messages=[...])`: images before the
    question."""
    parts = [content(image) for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
