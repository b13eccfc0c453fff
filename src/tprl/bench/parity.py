"""Is pruning exact? Our view of a frozen LVLM against the stock class, in logits.

The definition of pruning that everything is measured against: the same model, the same positions,
and the dropped tokens masked out of attention in every layer and at every step. Where layers do not
attend to all tokens (`FrozenLVLM.definition`): the stock model given token ids with fewer
placeholders, the output of its own encoder without what was dropped, and the same positions.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tprl.errors import UserError
from tprl.lvlm.batching import axes
from tprl.lvlm.frozen import GREEDY, FrozenLVLM
from tprl.pruners.random import RandomPruner
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Sample, TokenSelection

# width x height: batches are ragged where an LVLM's grids follow the image
SIZES = ((96, 96), (150, 90), (60, 120))


class Parity(NamedTuple):
    """Largest absolute differences of logits over a batch of questions, and their spread for
    scale."""

    keep_all: float  # everything kept, against the stock forward on pixel_values
    pruned: float  # some tokens dropped, against the definition
    decode: float  # the same over cached decoding, against uncached forwards
    batch: float  # a left-padded ragged batch, against its samples alone
    std: float  # of the logits
    # greedy ids of all these pairs are equal, and the stock `generate`'s with everything kept
    same_ids: bool
    definition: str  # of pruning, see `FrozenLVLM.definition`


@torch.no_grad()
def parity(
    lvlm: FrozenLVLM, samples: Sequence[Sample], keep_ratio: float = 0.4, steps: int = 6
) -> Parity:
    """Compare on questions about images; `steps` tokens are decoded.

    Raises:
        UserError: there is no question with an image.
    """
    if not any(sample.images for sample in samples):
        raise UserError(
            f"none of the {len(samples)} questions has an image, and without one there is nothing "
            "to prune: use a dataset with images, e.g. dataset=scenes."
        )
    encoded = lvlm.encode(samples)
    # Everything kept must be the stock model: logits, and greedy ids through the cache.
    everything = splice(encoded, keep_all(encoded))
    inputs = stock_inputs(lvlm, samples)
    # With the positions that the stock `generate` would pass, and in the shapes of `forward`.
    places = {"position_ids": axes(encoded.positions), "logits_to_keep": 1, "use_cache": False}
    stock = lvlm.model(**inputs, **places).logits.float()
    whole = lvlm.model.generate(**inputs, max_new_tokens=steps, **GREEDY)
    expected = whole[:, inputs["input_ids"].shape[1] :]
    same = [_agree(_generate(lvlm, everything, steps)[0], expected)]

    # Pruned must be what the definition says: with the cache on one side, without on the other.
    selection = RandomPruner().select(encoded, keep_ratio)
    ids, logits = _generate(lvlm, splice(encoded, selection), steps)
    uncached, real = defined(lvlm, samples, selection, ids), _real(ids, lvlm.ends)
    same.append(bool(((uncached.argmax(-1) == ids) | ~real).all()))
    # Padding and neighbors in the batch must not matter.
    alone = []
    for row in range(len(samples)):
        single = lvlm.encode(samples[row : row + 1])
        selected = TokenSelection(selection.keep[row : row + 1, : single.visual_mask.shape[1]])
        own_ids, own_logits = _generate(lvlm, splice(single, selected), steps)
        same.append(_agree(own_ids, ids[row : row + 1]))
        alone.append(own_logits[:, 0])
    return Parity(
        keep_all=_gap(forward(lvlm, everything), stock),
        pruned=_gap(logits[:, :1], uncached[:, :1]),
        decode=_gap(logits, uncached, real),
        batch=_gap(logits[:, 0], torch.cat(alone)),
        std=float(stock.std()),
        same_ids=all(same),
        definition=lvlm.definition,
    )


def varied(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about images of three shapes."""
    out = []
    for i, sample in enumerate(samples):
        images = (image.resize(SIZES[i % 3], Image.Resampling.BILINEAR) for image in sample.images)
        out.append(sample._replace(images=tuple(images)))
    return out


def stock_inputs(lvlm: FrozenLVLM, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What the stock processor makes of the same prompts."""
    nested = [list(sample.images) for sample in samples]
    images = nested if any(nested) else None
    texts = [lvlm.render(sample) for sample in samples]
    inputs = lvlm.processor(text=texts, images=images, padding=True, return_tensors="pt")
    dtypes = {"pixel_values": lvlm.model.dtype}
    return {
        name: value.to(lvlm.device, dtypes.get(name, value.dtype)) for name, value in inputs.items()
    }


def masked(encoded: Encoded, selection: TokenSelection) -> Prompt:
    """Every token at its place, the dropped ones masked out of attention."""
    prompt = splice(encoded, keep_all(encoded))
    dropped = replace(encoded, visual_mask=encoded.visual_mask & ~selection.keep).is_visual
    return replace(prompt, attention=prompt.attention & ~dropped[:, -prompt.attention.shape[1] :])


@torch.no_grad()
def defined(
    lvlm: FrozenLVLM,
    samples: Sequence[Sample],
    selection: TokenSelection,
    ids: Int[Tensor, "B A"] | None = None,
) -> Float[Tensor, "B A N"]:
    """Logits as of `forward`, of questions pruned as the definition says."""
    encoded = lvlm.encode(samples)
    if lvlm.definition == "masked":
        return forward(lvlm, masked(encoded, selection), ids)
    return _shorter(lvlm, samples, encoded, selection, ids)


def _shorter(
    lvlm: FrozenLVLM,
    samples: Sequence[Sample],
    encoded: Encoded,
    selection: TokenSelection,
    ids: Int[Tensor, "B A"] | None,
) -> Float[Tensor, "B A N"]:
    """By the stock class alone: it encodes, looks words up, and puts both together."""
    inputs = stock_inputs(lvlm, samples)
    pixels = {name: inputs[name] for name in lvlm.pixel_inputs if name in inputs}
    seen = lvlm.model.get_image_features(**pixels, return_dict=True)
    # What is left of each prompt, and after it the answer, all but its last token.
    dropped = replace(encoded, visual_mask=encoded.visual_mask & ~selection.keep).is_visual
    alive = encoded.attention & ~dropped
    answer = encoded.input_ids[:, :0] if ids is None else ids[:, :-1]
    width = answer.shape[1]
    text = torch.cat([_left(encoded.input_ids, alive), answer], 1)
    places = torch.stack([_left(axis, alive) for axis in encoded.positions])
    places = torch.cat([places, places[..., -1:] + 1 + torch.arange(width, device=lvlm.device)], -1)
    # Features of all images follow each other as their placeholders do, prompt by prompt. Random
    # models may write placeholders, which stand for themselves.
    placeholder = text == lvlm.image_token
    visual = placeholder[:, : text.shape[1] - width]
    kept = alive[(encoded.input_ids == lvlm.image_token) & encoded.attention]
    values = lvlm.words(text)
    features = torch.cat(list(seen.pooler_output))[kept]
    values[F.pad(visual, (0, width))] = features.to(values)
    stacked = isinstance(seen.pooler_output, Tensor)
    features = values[placeholder]
    seen.pooler_output = features.unsqueeze(0) if stacked else [features]
    out = lvlm.model(
        input_ids=text,
        attention_mask=F.pad(_left(alive, alive), (0, width), value=True).long(),
        position_ids=axes(places),
        mm_encoder_outputs={"image": seen},
        logits_to_keep=width + 1,
        use_cache=False,
        **{name: x for name, x in lvlm.inputs_beside(text, visual).items() if x.ndim == 2},
    )
    return out.logits.float()


def _left(values: Shaped[Tensor, "B S"], alive: Bool[Tensor, "B S"]) -> Shaped[Tensor, "B N"]:
    """The live columns of each row, zeros before them."""
    length = int(alive.sum(1).max())
    rows = [row[columns] for row, columns in zip(values, alive, strict=True)]
    return torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])


@torch.no_grad()
def forward(
    lvlm: FrozenLVLM, prompt: Prompt, ids: Int[Tensor, "B A"] | None = None
) -> Float[Tensor, "B A N"]:
    """Logits that predict each of the tokens `ids` after the prompt (None: the first one), without
    a cache."""
    ids = prompt.input_ids[:, :0] if ids is None else ids[:, :-1]
    after = prompt.positions[..., -1:] + 1 + torch.arange(ids.shape[1], device=lvlm.device)
    with lvlm.deepstack(prompt.deep, prompt.visual):
        out = lvlm.model(
            inputs_embeds=torch.cat([prompt.embeds, lvlm.words(ids)], 1),
            attention_mask=F.pad(prompt.attention, (0, ids.shape[1]), value=True).long(),
            position_ids=axes(torch.cat([prompt.positions, after], -1)),
            logits_to_keep=ids.shape[1] + 1,
            use_cache=False,
            **lvlm.inputs_beside(torch.cat([prompt.input_ids, ids], 1), prompt.visual),
        )
    return out.logits.float()


def _generate(
    lvlm: FrozenLVLM, prompt: Prompt, steps: int
) -> tuple[Int[Tensor, "B A"], Float[Tensor, "B A N"]]:
    """Greedy ids and their logits, with the cache."""
    with lvlm.deepstack(prompt.deep, prompt.visual):
        out = lvlm.model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention.long(),
            position_ids=axes(prompt.positions),
            max_new_tokens=steps,
            **lvlm.inputs_beside(prompt.input_ids, prompt.visual),
            **GREEDY,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences, torch.stack(out.logits, 1).float()


def _real(ids: Int[Tensor, "B A"], ends: Sequence[int]) -> Tensor:
    """Up to the first of the end tokens; what follows is padding."""
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device))
    return is_end.cumsum(1) - is_end.long() == 0


def _agree(first: Tensor, other: Tensor) -> bool:
    """Equal up to the padding after the longer of the two."""
    width = min(first.shape[1], other.shape[1])
    return torch.equal(first[:, :width], other[:, :width])


def _gap(first: Tensor, other: Tensor, where: Tensor | None = None) -> float:
    gap = (first - other).abs().amax(-1)
    return float((gap if where is None else gap[where]).max())


def parity_table(results: dict[str, Parity]) -> str:
    """Markdown, a line per LVLM."""
    lines = [
        "| LVLM | pruning means | all kept | pruned | decoding | batch = alone | logits' std "
        "| same ids |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        numbers = " | ".join(f"{value:.1e}" if value else "0" for value in result[:4])
        lines.append(
            f"| `{name}` | {result.definition} | {numbers} | {result.std:.2f} | "
            f"{'yes' if result.same_ids else '**no**'} |"
        )
    return "\n".join(lines)
