"""Synthetic prompts for tests: what `LVLM.encode` would return, without a model."""

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tprl.lvlm.patches import cells
from tprl.pruners.tprl import TPRL
from tprl.types import Encoded, TokenSelection, Tower

Grids = Sequence[Sequence[tuple[int, int]]]
IMAGE_ID = 7  # the token id that stands in for every visual token
# three samples; the last one has two images
RAGGED: Grids = (((12, 12),), ((6, 9),), ((4, 4), (5, 7)))


def toy_encoded(
    grids: Grids = RAGGED,
    *,
    width: int = 16,
    vision_width: int = 24,
    extras: frozenset[str] | Sequence[str] = frozenset(),
    uids: Sequence[str] | None = None,
    axes: int = 1,
    seed: int = 0,
) -> Encoded:
    """A batch of `len(grids)` prompts; `grids[b]` lists the (rows, columns) of each image of sample
    b (may be empty).

    Every sample reads `before` text columns, its images with one text column between two of them,
    then `after` text columns of which the first and the last two are template words and the rest is
    the question. Lengths of the text differ between samples; sequences are left-padded, visual
    tokens right-padded. The content of a sample depends on (uid, seed) and its grids only, so the
    same sample alone or in any batch has the same values.

    Args:
        extras: names among "cls_attention" [B V] (sums to 1; as do "last_cls_attention",
            "middle_attention", "last_attention" and "word_attention"),
            "vision_features" [B V vision_width],
            "cls_feature" (the same for all tokens of an image), "vision_keys" [B V 8], "last_keys"
            [B V vision_width], "clip_relevance" [B V], "region" [B V] (1/(1+rank) on about a sixth
            of the tokens), "patch_embeds" [B V vision_width], with `toy_tower` for them, and
            "pixels" [B V 3 2 2], with `toy_look` for them, and "rgb" [B V 3 2 2]; padded entries
            are 0.
        uids: defaults to "toy-0", "toy-1", ...
        axes: P, the number of position axes; axis p counts columns multiplied by p + 1.
    """
    names = list(uids) if uids is not None else [f"toy-{b}" for b in range(len(grids))]
    parts = [
        _sample(uid, sample, width, vision_width, frozenset(extras), seed)
        for uid, sample in zip(names, grids, strict=True)
    ]
    length = max(len(part["input_ids"]) for part in parts)
    attention = _pad(
        [torch.ones(len(part["input_ids"]), dtype=torch.bool) for part in parts], length, left=True
    )
    offset = [length - len(part["input_ids"]) for part in parts]
    visual = max(len(part["visual_at"]) for part in parts)
    mask = _pad([torch.ones(len(part["visual_at"]), dtype=torch.bool) for part in parts], visual)
    column = (attention.cumsum(1) - 1).clamp(min=0)
    return Encoded(
        uids=tuple(names),
        input_ids=_pad([part["input_ids"] for part in parts], length, left=True),
        embeds=_pad([part["embeds"] for part in parts], length, left=True),
        attention=attention,
        positions=torch.stack([column * (axis + 1) for axis in range(axes)]),
        visual_at=_pad(
            [part["visual_at"] + start for part, start in zip(parts, offset, strict=True)], visual
        ),
        visual_mask=mask,
        image_of=_pad([part["image_of"] for part in parts], visual),
        grids=tuple(tuple((grid,) for grid in sample) for sample in grids),
        question=_pad([part["question"] for part in parts], length, left=True),
        extras={name: _pad([part[name] for part in parts], visual) for name in sorted(extras)},
        project=lambda features: features @ _projector(vision_width, width),
        tower=toy_tower(vision_width) if "patch_embeds" in extras else None,
        look=partial(toy_look, width=width) if "pixels" in extras else None,
    )


def merged_and_extra(selection: TokenSelection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors of a selection that merges tokens and adds some; fails if one is missing."""
    assert selection.merged is not None
    assert selection.extra is not None
    assert selection.extra_at is not None
    assert selection.extra_mask is not None
    return selection.merged, selection.extra, selection.extra_at, selection.extra_mask


def toy_look(images: Sequence[Tensor], width: int) -> tuple[list[Tensor], None]:
    """Tokens of images of 2 x 2 pixels a token, each a random projection of its own pixels."""
    return [cells(image, 2).flatten(1) @ _projector(12, width) for image in images], None


class ToyBlock:
    """A block of a vision tower with random weights, 3 heads and an MLP of 4 x the width."""

    def __init__(self, width: int, draw: torch.Generator) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=draw) / rows**0.5

        self.query, self.key, self.value, self.out = (weight(width, width) for _ in range(4))
        self.up, self.down = weight(width, 4 * width), weight(4 * width, width)

    def attend(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = layer_norm(x, x.shape[-1:])
        q, k, v = (
            (h @ matrix).unflatten(-1, (3, -1)).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        mixed = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
        return x + mixed.transpose(1, 2).flatten(2) @ self.out, k.mean(1)

    def feed(self, x: Tensor) -> Tensor:
        return x + gelu(layer_norm(x, x.shape[-1:]) @ self.up) @ self.down


def toy_tower(width: int, blocks: int = 6, has_cls: bool = True) -> Tower:
    """Always the same one for the same arguments; `width` is a multiple of 3."""
    draw = torch.Generator().manual_seed(12)
    cls = torch.randn(width, generator=draw)
    return Tower(cls if has_cls else None, [ToyBlock(width, draw) for _ in range(blocks)])


def _projector(vision_width: int, width: int) -> Tensor:
    return (
        torch.randn(vision_width, width, generator=torch.Generator().manual_seed(11))
        / vision_width**0.5
    )


def _sample(
    uid: str,
    grids: Sequence[tuple[int, int]],
    width: int,
    vision_width: int,
    extras: frozenset[str],
    seed: int,
) -> dict[str, Tensor]:
    digest = hashlib.blake2b(f"{seed}/{uid}".encode(), digest_size=7).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest))
    before, after = (
        int(torch.randint(low, high, (), generator=rng)) for low, high in ((2, 5), (5, 9))
    )
    counts = [rows * columns for rows, columns in grids]
    image_of = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
    visual_at = torch.arange(sum(counts)) + before + image_of
    length = before + sum(counts) + max(0, len(counts) - 1) + after
    ids = torch.randint(IMAGE_ID + 1, 100, (length,), generator=rng)
    ids[visual_at] = IMAGE_ID
    question = torch.zeros(length, dtype=torch.bool)
    question[length - after + 1 : length - 2] = True
    part = {
        "input_ids": ids,
        "embeds": torch.randn(length, width, generator=rng),
        "visual_at": visual_at,
        "image_of": image_of,
        "question": question,
    }
    n = len(visual_at)
    values = {
        "cls_attention": torch.randn(n, generator=rng).softmax(0),
        "vision_features": torch.randn(n, vision_width, generator=rng),
        "region": _region(n, rng),
        "cls_feature": torch.randn(len(counts), vision_width, generator=rng)[image_of],
        "vision_keys": torch.randn(n, 8, generator=rng),
        "last_keys": torch.randn(n, vision_width, generator=rng),
        "clip_relevance": torch.rand(n, generator=rng) - 0.5,
        **{
            name: torch.randn(n, generator=rng).softmax(0)
            for name in ("last_cls_attention", "middle_attention", "last_attention")
        },
        "patch_embeds": torch.randn(n, vision_width, generator=rng),
        "pixels": torch.randn(n, 3, 2, 2, generator=rng),
        "word_attention": torch.randn(n, generator=rng).softmax(0),
        "rgb": torch.rand(n, 3, 2, 2, generator=rng),
    }
    return part | {name: values[name] for name in extras}


def _region(n: int, rng: torch.Generator) -> Tensor:
    """[n]; 1, 1/2, 1/3, ... on a random sixth of the tokens, 0 elsewhere."""
    scores, chosen = torch.zeros(n), torch.randperm(n, generator=rng)[: -(-n // 6)]
    scores[chosen] = 1 / (1 + torch.arange(len(chosen)))
    return scores


def _pad(rows: Sequence[Tensor], length: int, left: bool = False) -> Tensor:
    """Stack rows of different lengths, zeros (or False) in the padding."""
    out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for b, row in enumerate(rows):
        start = length - len(row) if left else 0
        out[b, start : start + len(row)] = row
    return out


def untrained_policy(width: int) -> TPRL:
    """A policy for tokens of this width, with logits that differ, and that depend on the
    question."""
    torch.manual_seed(0)
    policy = TPRL(width, code_width=8, hidden=16, width=16, layers=1, heads=2, select="topk")
    with torch.no_grad():
        policy.net.policy_head.out.weight.mul_(50)
    return policy.eval()
