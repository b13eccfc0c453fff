"""Where tokens disappear: the only function that removes, replaces or adds visual tokens of a
prompt."""

from typing import Literal

import torch
from torch import Tensor

from tprl.types import Encoded, Prompt, TokenSelection, marked


def splice(
    encoded: Encoded, selection: TokenSelection, positions: Literal["keep", "compact"] = "keep"
) -> Prompt:
    """Apply a selection to a batch; pure and model-agnostic.

    Args:
        encoded: the unpruned batch.
        selection: kept tokens in raster order, with `merged` embeddings and `extra` tokens if a
            method makes them. An extra token enters the sequence right after the place of the
            visual token it is anchored to, and has its deepstack features unless it has some of its
            own. A `core` moves to the front of its image.
        positions: "keep" leaves every survivor at its original position (gaps appear) or at that
            which the selection gives, "compact" renumbers 0..n-1.

    Returns:
        A left-padded prompt. Keeping everything returns the input's own tensors' values unchanged.

    Raises:
        ValueError: a padded visual token is kept or anchors an extra token, or a sample with an
            image keeps none.
    """
    at, column = encoded.visual_at, _columns(encoded, selection)
    length = _checked_length(encoded, selection, column)
    embeds, deep = encoded.embeds, encoded.deep
    # Merged tokens take the places of kept ones; the caller's embeddings stay as they are.
    if selection.merged is not None:
        embeds = embeds.clone()
        row, token = selection.keep.nonzero(as_tuple=True)
        embeds[row, at[row, token]] = selection.merged[row, token].to(embeds.dtype)
    # [B S] which columns are visual, and of which image.
    visual = encoded.is_visual
    # padded entries add nothing to the column that they name
    number = encoded.image_of * encoded.visual_mask
    image = torch.zeros_like(encoded.input_ids).scatter_add(1, at, number)
    # A selection may bring positions of its own, of all columns and then of its extra tokens.
    ids, moved, alive = encoded.input_ids, selection.positions, column
    pos = encoded.positions if moved is None else moved[..., : ids.shape[1]]
    # Even numbers leave room for an extra token right after its anchor.
    order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) * 2
    if selection.core is not None:
        order = _core_first(encoded, selection.core & selection.keep, order)
    if selection.extra is not None:
        assert selection.extra_at is not None
        assert selection.extra_mask is not None
        # Extra tokens are appended as columns, then sorted in behind their anchors.
        anchor = at.gather(1, selection.extra_at)
        embeds = torch.cat([embeds, selection.extra.to(embeds.dtype)], 1)
        if moved is None:
            place = pos.gather(2, anchor.expand(pos.shape[0], -1, -1))
        else:
            place = moved[..., ids.shape[1] :]
        pos = torch.cat([pos, place], 2)
        ids = torch.cat([ids, ids.gather(1, anchor)], 1)
        image = torch.cat([image, image.gather(1, anchor)], 1)
        if deep is not None:
            added = selection.extra_deep
            added = _columns_at(deep, anchor) if added is None else added.to(deep.dtype)
            deep = torch.cat([deep, added], 1)
        visual = torch.cat([visual, selection.extra_mask], 1)
        alive = torch.cat([alive, selection.extra_mask], 1)
        order = torch.cat([order, anchor * 2 + 1], 1)

    # Dead columns sort to the front, survivors keep their order: left padding for free.
    place_of = torch.where(alive, order, order - 2 * order.shape[1])
    index = place_of.argsort(dim=1, stable=True)[:, -length:]
    attention = alive.gather(1, index)
    pos = pos.gather(2, index.expand(pos.shape[0], -1, -1))
    # Gaps stay unless the caller wants consecutive positions.
    if positions == "compact":
        pos = (attention.cumsum(1) - 1).clamp(min=0).expand_as(pos)
    return Prompt(
        uids=encoded.uids,
        input_ids=ids.gather(1, index),
        embeds=_columns_at(embeds, index),
        attention=attention,
        positions=torch.where(attention, pos, torch.zeros_like(pos)),
        visual=visual.gather(1, index) & attention,
        image=image.gather(1, index),
        deep=None if deep is None else _columns_at(deep, index),
    )


def keep_all(encoded: Encoded) -> TokenSelection:
    """The selection that prunes nothing."""
    return TokenSelection(keep=encoded.visual_mask)


def _core_first(encoded: Encoded, core: Tensor, order: Tensor) -> Tensor:
    """`order` [B S], in which the core's columns come right before the first column of their
    image."""
    at, mask, image = encoded.visual_at, encoded.visual_mask, encoded.image_of
    width = max(map(len, encoded.grids), default=0)
    # [B images] the first column of each image, then of the image that every token belongs to.
    last = order.shape[1]
    columns = at.masked_fill(~mask, last)
    first = at.new_full((len(at), max(width, 1)), last).scatter_reduce(1, image, columns, "amin")
    # An odd number between the text before the image and the image; ties keep raster order.
    front = torch.where(core, 2 * first.gather(1, image) - 1, order.gather(1, at))
    # Padded entries name column 0, which stays what it is.
    row, token = (core & mask).nonzero(as_tuple=True)
    order = order.clone()
    order[row, at[row, token]] = front[row, token]
    return order


def _columns_at(values: Tensor, index: Tensor) -> Tensor:
    """[B S F] -> [B N F] at the columns [B N]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _columns(encoded: Encoded, selection: TokenSelection) -> Tensor:
    """[B S] True on every column that survives: all text, and the kept visual tokens."""
    dropped = encoded.visual_mask & ~selection.keep
    return encoded.attention & ~marked(encoded.attention, encoded.visual_at, dropped)


def _checked_length(encoded: Encoded, selection: TokenSelection, column: Tensor) -> int:
    """Columns of the longest prompt that is left, `column` being those that survive; the host waits
    for the device once.

    Raises:
        ValueError: see `splice`.
    """
    keep, mask = selection.keep, encoded.visual_mask
    padded, astray, length = keep & ~mask, keep[:, :0], column.sum(1)
    # Padding entries of `extra` may name any token: only live ones are checked.
    if selection.extra_at is not None and selection.extra_mask is not None:
        astray = selection.extra_mask & ~mask.gather(1, selection.extra_at)
        length = length + selection.extra_mask.sum(1)
    # An image must leave something; a prompt of text alone has nothing to keep.
    empty = mask.any(1) & (selection.count == 0)
    faults = [padded.any(1), astray.any(1), empty]
    # [B 4] all that decides, in one transfer.
    table = torch.stack([*map(Tensor.long, faults), length], 1).tolist()
    bad, unplaced, left_empty, lengths = zip(*table, strict=True)
    if any(bad):
        raise ValueError(
            "the selection keeps a padded visual token: mask the scores with encoded.visual_mask."
        )
    if any(unplaced):
        raise ValueError(
            "an extra token stands on a padded visual token: extra_at must name a valid one."
        )
    if any(left_empty):
        uid = encoded.uids[left_empty.index(1)]
        raise ValueError(
            f"sample {uid} keeps none of its visual tokens; keep at least one per image."
        )
    # The longest prompt of the batch decides the width.
    return max(lengths)
