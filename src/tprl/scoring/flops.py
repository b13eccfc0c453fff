"""What one question costs in FLOPs, as pruned and with all its tokens."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tprl import cost
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner
from tprl.lvlm.listening import WORD_ATTENTION
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.word_attention import listening_flops
from tprl.scoring.scorer import Scorer
from tprl.types import Encoded, Pruner, Sample


def question_flops(
    scorer: Scorer,
    encoded: Encoded,
    i: int,
    sample: Sample,
    pruner: Pruner | LayerPruner,
    kept: Sequence[int],
    plan: LayerPlan | None = None,
) -> tuple[float, float]:
    """FLOPs of one question as pruned and with all its tokens (see `cost.CONVENTION`); the answer's
    length is the reference's. `kept` is the number of tokens of each image that the language model
    reads; a plan drops some of them between its layers."""
    lvlm: Any = scorer.lvlm
    answer = lvlm.answer_length(sample.answers[0])
    pruned, full = question_parts(lvlm, encoded, i, answer, pruner, kept, plan)
    return float(pruned["total"]), float(full["total"])


def question_parts(
    lvlm: Any,
    encoded: Encoded,
    i: int,
    answer: int,
    pruner: Pruner | LayerPruner,
    kept: Sequence[int],
    plan: LayerPlan | None = None,
) -> tuple[dict[str, int], dict[str, int]]:
    """`question_flops` part by part (see `cost.total`), for an answer of so many tokens; choosing
    is `selector`."""
    shape: cost.LVLMShape = lvlm.shape
    # Visual tokens of each image of question i, all other tokens of its prompt, and its words.
    images, text, words = encoded.counts[i]
    tiles = sum(encoded.tiles[i], ())
    full = _parts(shape, text, sum(images), answer, tiles)
    if pruner.name == KeepAll.name:
        return full, full
    # A plan gives each layer its own number of tokens; else all compute what is kept.
    if plan is not None:
        pruned = _parts(shape, text, tuple(plan.counts(*images)), answer, tiles)
        selector = plan.flops(shape.lm, text, *images)
    else:
        chooser: Any = pruner
        if chooser.shows_smaller_images:
            smaller = [
                chooser.tiles(shape, *seen) for seen in zip(encoded.tiles[i], kept, strict=True)
            ]
            tiles = sum(smaller, ())
        pruned = _parts(shape, text, sum(kept), answer, tiles)
        selector = choosing(chooser, shape, images, words, kept)
    return {**pruned, "selector": selector, "total": pruned["total"] + selector}, full


def choosing(
    chooser: Any, shape: cost.LVLMShape, images: Sequence[int], words: int, kept: Sequence[int]
) -> int:
    """What choosing `kept` tokens of each image costs; of core and focus, both."""
    if chooser.choosers:
        total = 0
        for part, share in chooser.choosers:
            total += choosing(part, shape, images, words, [round(share * n) for n in kept])
        return total
    # A policy reads all images of a prompt together.
    parts = chooser.flops_by_part(sum(images), words, sum(kept))
    if parts is not None:
        policy = sum(parts.values())
        heard = images if WORD_ATTENTION in chooser.extras else ()
        return policy + sum(listening_flops(shape, tokens) for tokens in heard)
    return sum(chooser.flops(shape, *counts) for counts in zip(images, kept, strict=True))


@lru_cache(maxsize=4096)
def _parts(
    shape: cost.LVLMShape,
    text: int,
    visual: int | tuple[int, ...],
    answer: int,
    tiles: tuple[cost.Grid, ...],
) -> dict[str, int]:
    return cost.total(
        shape, text_tokens=text, visual_tokens=visual, answer_tokens=answer, images=tiles
    )
