"""How much each patch of a CLIP vision tower has to do with a text: for selectors that use CLIP's
own relevance."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from tprl.errors import UserError
from tprl.runtime.hub import within_reach


class ClipText:
    """The two projections and the text tower of a CLIP model; loaded when first used.

    Args:
        source: a folder or hub id; None: there is none.
        device: where it lives.
    """

    def __init__(self, source: str | Path | None, device: torch.device) -> None:
        self.source, self.device = source, device

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        if self.source is None or not within_reach(str(self.source)):
            raise UserError(
                "clip_relevance needs the CLIP model that the vision tower is "
                f"from, and {self.source} is not there: set "
                "model.clip=/path/to/clip, e.g. openai/clip-vit-large-patch14-336."
            )
        model: Any = CLIPModel.from_pretrained(self.source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        return model.eval().requires_grad_(False).to(self.device), tokenizer

    @torch.no_grad()
    def relevance(
        self, patches: Float[Tensor, "B V C"], texts: Sequence[str]
    ) -> Float[Tensor, "B V"]:
        """Cosine of every patch with its sample's text; of a long text the mean over its segments.

        Args:
            patches: the tower's hidden states that the projector reads (no CLS), before CLIP's last
                norm.
            texts: one per sample.
        """
        model, _ = self._parts
        # [B V P] patches in the space that CLIP compares texts with.
        image = model.visual_projection(model.vision_model.post_layernorm(patches.float()))
        # [S P] all segments of all texts in one batch; `owner` [S] says whose each is.
        segments = [self._segments(text) for text in texts]
        owner = torch.tensor(
            [b for b, segment in enumerate(segments) for _ in segment], device=patches.device
        )
        embedded = self._embed(list(chain.from_iterable(segments)))
        # [S V] against the patches of the segment's own sample.
        cosine = torch.einsum(
            "svp,sp->sv", normalize(image, dim=-1)[owner], normalize(embedded, dim=-1)
        )
        # Mean over the segments of a sample: [B V].
        count = owner.bincount(minlength=len(texts)).unsqueeze(1)
        return cosine.new_zeros(len(texts), cosine.shape[1]).index_add_(0, owner, cosine) / count

    def _segments(self, text: str) -> list[list[int]]:
        """Token ids of a text, cut where the text tower's positions end (77 for CLIP)."""
        model, tokenizer = self._parts
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer(text)["input_ids"]
        return [ids[start : start + length] for start in range(0, len(ids), length)]

    def _embed(self, segments: Sequence[list[int]]) -> Float[Tensor, "S P"]:
        model, _ = self._parts
        # Padded on the right: the text tower is causal, so that padding changes nothing.
        width = max(map(len, segments))
        ids = torch.tensor(
            [segment + [0] * (width - len(segment)) for segment in segments], device=self.device
        )
        mask = torch.tensor(
            [[1] * len(segment) + [0] * (width - len(segment)) for segment in segments],
            device=self.device,
        )
        hidden = model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        # CLIP reads a text at its end token; the last token of a segment that has none.
        end = (ids == model.config.text_config.eos_token_id) & mask.bool()
        at = torch.where(end.any(1), end.int().argmax(1), mask.sum(1) - 1)
        return model.text_projection(hidden[torch.arange(len(ids), device=self.device), at])
