"""One question about one image, answered with all visual tokens and with those that pruners keep:
the work behind the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tprl import cost
from tprl.bench.latency import Asked, Reading, ask, stopwatch
from tprl.budget import check_keep_ratio
from tprl.data.images import BadImage, read_picture
from tprl.errors import UserError
from tprl.evaluation.pictures import Mask, last_seen, on_grid
from tprl.evaluation.results import FULL
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPruner
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.learned import LearnedPruner, check_family
from tprl.scoring.flops import question_parts
from tprl.types import Box, Pruner, Sample

TURNS = 2  # of every pruner; its fastest one counts
MAX_CHARACTERS = 2000  # of a question
AnyPruner = Pruner | LayerPruner


@dataclass(frozen=True)
class Result:
    """An answer and what it took.

    `kept` is the number of visual tokens that the language model reads, the mean over its layers
    where a method drops some between them. `flops` are those of the question (`cost.CONVENTION`)
    for an answer as long as that with all tokens. `keep` and `probability` are [rows, columns] over
    what the model sees of the image: None where tokens are no longer patches, and where there is no
    policy.
    """

    pruner: str
    answer: str
    kept: float
    flops: float
    reading: Reading
    keep: Mask | None = None
    probability: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class Comparison:
    """The same question with all visual tokens and with those that each pruner keeps."""

    image: Image.Image
    question: str
    full: Result
    pruned: tuple[Result, ...]
    seen: Box | None = None  # the part of the image that the model sees, in pixels; None: all of it


def compare_pruners(
    lvlm: FrozenLVLM,
    pruners: Mapping[str, AnyPruner],
    source: str | Path | Image.Image | None,
    question: str,
    keep_ratio: float,
) -> Comparison:
    """Answer with all tokens, then with each pruner.

    Args:
        lvlm: the frozen model.
        pruners: under the names that they get in the result.
        source: the image or its file.
        question: about it.
        keep_ratio: kept fraction of the visual tokens.

    Raises:
        UserError: no image or question that the model can read, no pruner, or one that does not fit
            model or ratio.
    """
    # Input is refused before the model runs.
    image, question = open_image(source), check_question(lvlm, question)
    if not pruners:
        raise UserError("There is nothing to compare with: choose a pruner.")
    ratio = check_keep_ratio(keep_ratio)
    sample = Sample(f"demo/{question}", (image,), question, ())
    # The reference takes its turns with the others and comes first in every round.
    everyone: dict[str, AnyPruner] = {FULL: KeepAll(), **pruners}
    fastest = _fastest(lvlm, everyone, sample, ratio)
    # FLOPs of all are counted for the same length, or a short answer would look cheap.
    length = lvlm.answer_length(_text(lvlm, fastest[FULL]))
    full, *pruned = (
        _result(lvlm, name, everyone[name], asked, ratio, length) for name, asked in fastest.items()
    )
    return Comparison(image, question, full, tuple(pruned), last_seen(fastest[FULL].encoded, 0))


def open_image(source: str | Path | Image.Image | None) -> Image.Image:
    """The picture that viewers show, see `images.read_picture`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if source is None:
        raise UserError("There is no image: upload one, or pick an example.")
    try:
        return read_picture(source).image
    except BadImage as bad:
        raise UserError(
            f"The image cannot be read ({bad}): give a complete PNG, JPEG or WebP file."
        ) from bad


def check_question(lvlm: FrozenLVLM, question: str) -> str:
    """The question without surrounding white space.

    Raises:
        UserError: there is none, it is too long, or it has words that the model's tokenizer does
            not know.
    """
    # From cheap to costly: characters, then the placeholder, then the tokenizer.
    question = question.strip()
    if not question:
        raise UserError("There is no question: type one, or pick a suggestion.")
    if len(question) > MAX_CHARACTERS:
        raise UserError(
            f"The question has {len(question)} characters: use at most {MAX_CHARACTERS}."
        )
    if lvlm.placeholder in question:  # before the tokenizer's own word for it
        raise UserError(
            f'{lvlm.name} does not know "{lvlm.placeholder}": ask in words of the suggestions.'
        )
    if (refused := lvlm.refusal(Sample("", (), question, ()))) is not None:
        raise UserError(f"{lvlm.name} cannot be asked this, {refused[0]}: {refused[1]}.")
    # A small vocabulary maps strange words to a single unknown token; offsets tell which words.
    read = lvlm.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    unread = {lvlm.tokenizer.unk_token_id}
    pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
    unknown = dict.fromkeys(
        f'"{question[start:end]}"' for token, (start, end) in pairs if token in unread
    )
    if unknown:
        raise UserError(
            f"{lvlm.name} does not know {', '.join(unknown)}: "
            "ask in words like those of the suggestions."
        )
    return question


def _fastest(
    lvlm: FrozenLVLM, pruners: Mapping[str, AnyPruner], sample: Sample, ratio: float
) -> dict[str, Asked]:
    """Of `TURNS` identical passes of every pruner. They take turns, and a pass before them does not
    count: what runs first after a while is slow, and the same work should show the same time,
    whoever does it."""
    # Pruners that do not fit are refused before the clock runs.
    for pruner in pruners.values():
        check_family(pruner, lvlm)
        chooser: Any = pruner
        chooser.check_reach(ratio, lvlm.shape)
    clock, length = stopwatch(lvlm.device), lvlm.max_new_tokens

    def passed(pruner: AnyPruner) -> Asked:
        return ask(lvlm, lambda: lvlm.encode([sample], pruner.extras), pruner, ratio, clock, length)

    # The uncounted pass; see the docstring.
    passed(next(iter(pruners.values())))
    # The minimum is the least disturbed pass: disturbances only add time.
    fastest: dict[str, Asked] = {}
    for _ in range(TURNS):
        for name, pruner in pruners.items():
            turn = passed(pruner)
            if name not in fastest or turn.reading.total < fastest[name].reading.total:
                fastest[name] = turn
    return fastest


def _text(lvlm: FrozenLVLM, asked: Asked) -> str:
    return lvlm.tokenizer.batch_decode(asked.ids, skip_special_tokens=True)[0].strip()


def _result(
    lvlm: FrozenLVLM, name: str, pruner: AnyPruner, asked: Asked, ratio: float, length: int
) -> Result:
    # One question in the batch: FLOPs follow the tokens that each of its images kept.
    (images,) = asked.selection.per_image(asked.encoded)
    flops, _ = question_parts(lvlm, asked.encoded, 0, length, pruner, images, asked.plan)
    kept = cost.layer_mean(asked.plan.counts(*images)) if asked.plan else float(sum(images))
    # A mask is shown only where kept tokens are still patches.
    patches = asked.plan is None and asked.selection.extra is None
    keep = on_grid(asked.encoded, 0, asked.selection.keep[0]) if patches else None
    return Result(
        name,
        _text(lvlm, asked),
        kept,
        float(flops["total"]),
        asked.reading,
        keep,
        _map(pruner, asked, ratio),
    )


def _map(pruner: AnyPruner, asked: Asked, ratio: float) -> NDArray[np.floating[Any]] | None:
    """The policy's keep probabilities."""
    if not isinstance(pruner, LearnedPruner):
        return None
    chances = pruner.logits(pruner.observe(asked.encoded), ratio).sigmoid()
    return on_grid(asked.encoded, 0, chances[0]).astype(float)
