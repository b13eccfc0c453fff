"""Batches of encoded questions as one: what `Encoded.rows` takes apart, put together again."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tprl.types import Encoded

IN_COLUMNS = ("embeds", "attention", "question")  # [B S ...], zero on padding
IN_TOKENS = ("visual_mask", "image_of")  # [B V]
LISTS = ("uids", "grids", "tiles", "questions", "seen")  # one entry per sample


def joined_encodings(parts: Sequence[Encoded]) -> Encoded:
    """Encodings of consecutive questions by one model, as one batch."""
    if len(parts) == 1:
        return parts[0]
    columns = max(part.attention.shape[1] for part in parts)
    tokens = max(part.visual_mask.shape[1] for part in parts)
    lines = [_widened(part, columns, tokens) for part in parts]
    fields: dict[str, Any] = {}
    for name in (*IN_COLUMNS, *IN_TOKENS, "input_ids", "visual_at"):
        fields[name] = torch.cat([getattr(line, name) for line in lines])
    for name in LISTS:
        fields[name] = tuple(chain.from_iterable(getattr(line, name) for line in lines))
    fields["positions"] = torch.cat([line.positions for line in lines], 1)
    # Prompts of text alone have none of what is made of images.
    fields["extras"] = extras = {}
    for name in dict.fromkeys(chain.from_iterable(line.extras for line in lines)):
        extras[name] = _rows([line.extras.get(name) for line in lines], lines)
    if any(line.deep is not None for line in lines):
        fields["deep"] = _rows([line.deep for line in lines], lines)
    seeing = max(lines, key=lambda line: len(line.extras) + (line.tower is not None))
    return replace(seeing, **fields)


def _rows(values: Sequence[Tensor | None], lines: Sequence[Encoded]) -> Tensor:
    """Values of all samples, zeros where a part has none."""
    known = next(value for value in values if value is not None)
    pairs = zip(values, lines, strict=True)
    return torch.cat(
        [known.new_zeros(len(line), *known.shape[1:]) if v is None else v for v, line in pairs]
    )


def _widened(part: Encoded, columns: int, tokens: int) -> Encoded:
    """The same with so many columns, new ones on the left, and places for so many visual tokens,
    new ones on the right."""
    left = columns - part.attention.shape[1]
    width = part.visual_mask.shape[1]
    fields: dict[str, Any] = {name: _pad(getattr(part, name), left, 0) for name in IN_COLUMNS}
    fields |= {name: _pad(getattr(part, name), 0, tokens - width) for name in IN_TOKENS}
    # Nothing reads the ids of padding, but image tokens among them would be counted: a prompt's
    # last token is text.
    ids = torch.cat([part.input_ids[:, -1:].expand(-1, left), part.input_ids], 1)
    # Padded entries name column 0.
    at = (part.visual_at + left) * part.visual_mask
    extras = {}
    for name, value in part.extras.items():
        per_token = value.ndim > 1 and value.shape[1] == width
        extras[name] = _pad(value, 0, tokens - width) if per_token else value
    return replace(
        part,
        **fields,
        input_ids=ids,
        visual_at=_pad(at, 0, tokens - width),
        positions=pad(part.positions, (left, 0)),
        deep=None if part.deep is None else _pad(part.deep, left, 0),
        extras=extras,
    )


def _pad(value: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after along the second axis."""
    return pad(value, (0, 0) * (value.ndim - 2) + (before, after))
