"""One question about one image, answered with all visual tokens and by pruners: the work behind the page."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tprl import cost
from tprl.budget import check_keep_ratio, need_ratio
from tprl.data.benchmark import MAX_PIXELS
from tprl.errors import UserError
from tprl.evaluation import analysis
from tprl.evaluation.evaluator import question_flops
from tprl.evaluation.figures import Mask
from tprl.evaluation.results import FULL
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.learned import LearnedPruner, check_family
from tprl.scoring import Scorer
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Pruner, Sample, TokenSelection

TURNS = 2  # the first after a while is slow


@dataclass(frozen=True)
class Result:
    """An answer and what it took.

    `kept` is what the language model reads of the visual tokens, the mean over its layers where a method drops some
    between them; `flops` are those of the whole question, see `cost.CONVENTION`; `milliseconds` is from the image to
    the answer, the faster of two runs. `keep` and `probability` are [rows, columns] over the image, None where tokens are no
    longer patches, and where there is no policy.
    """

    pruner: str
    answer: str
    kept: float
    flops: float
    milliseconds: float
    keep: Mask | None = None
    probability: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True)
class Comparison:
    """The same question with all `total` visual tokens and with each pruner's choice."""

    image: Image.Image
    question: str
    total: int
    full: Result
    pruned: tuple[Result, ...]


def open_image(given: str | Path | Image.Image | None) -> Image.Image:
    """A picture as RGB, upright as its camera says, at most `MAX_PIXELS` large.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if given is None:
        raise UserError("There is no image: upload one, or pick an example.")
    try:
        image = given if isinstance(given, Image.Image) else Image.open(given)
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            scale = (MAX_PIXELS / (size[0] * size[1])) ** 0.5
            image.draft("RGB", (round(size[0] * scale), round(size[1] * scale)))  # JPEGs are then decoded smaller
            image.thumbnail((max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))
        return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserError("The image is too large to be opened: scale it down first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError("The image cannot be read: is the file complete, and an image?") from error


def compare(
    scorer: Scorer,
    pruners: Mapping[str, Pruner | LayerPruner],
    given: str | Path | Image.Image | None,
    question: str,
    keep_ratio: float,
) -> Comparison:
    """Answer with all tokens, then with each pruner. FLOPs are those of the answer with all tokens in its length.

    Args:
        scorer: of the LVLM.
        pruners: under the names they get in the result.
        given: the image or its file.
        question: about it.
        keep_ratio: kept fraction of the visual tokens.

    Raises:
        UserError: no image, no question, no pruner, or one that does not fit the model or the ratio.
    """
    image = open_image(given)
    if not question.strip():
        raise UserError("There is no question: type one, or pick a suggestion.")
    if not pruners:
        raise UserError("There is nothing to compare with: choose a pruner.")
    ratio = check_keep_ratio(keep_ratio)
    everyone: dict[str, Pruner | LayerPruner] = {FULL: KeepAll(), **pruners}
    sample = Sample(f"demo/{question.strip()}", (image,), question.strip(), ("",))
    sample = sample._replace(answers=(_ask(scorer, FULL, everyone[FULL], sample, ratio).answer,))
    turns = [[_ask(scorer, name, pruner, sample, ratio) for name, pruner in everyone.items()] for _ in range(TURNS)]
    full, *pruned = (min(runs, key=lambda run: run.milliseconds) for runs in zip(*turns, strict=True))
    return Comparison(image, sample.question, round(full.kept), full, tuple(pruned))


@torch.no_grad()
def _ask(
    scorer: Scorer, name: str, pruner: Pruner | LayerPruner, sample: Sample, keep_ratio: float
) -> Result:
    check_family(pruner, scorer.lvlm)
    lvlm: Any = scorer.lvlm
    plan = None
    start = _now(lvlm.device)
    encoded = lvlm.encode([sample], pruner.extras)
    if isinstance(pruner, LayerPruner):
        if not hasattr(lvlm, "layers"):
            raise UserError(f"{name} drops tokens between layers, and {lvlm.name} has none: choose another pruner.")
        plan = LayerPlan.of(pruner, need_ratio(name, keep_ratio), lvlm.layers)
        selection = keep_all(encoded)
        (answer,) = lvlm.answer(splice(encoded, selection), plan)
    else:
        selection = pruner.select(encoded, keep_ratio)
        (answer,) = lvlm.answer(splice(encoded, selection))
    spent = 1e3 * (_now(lvlm.device) - start)
    (images,) = selection.per_image(encoded)
    kept = cost.layer_mean(plan.counts(*images)) if plan else sum(images)
    flops = question_flops(scorer, encoded, 0, sample, pruner, images, plan)[0]
    patches = None if plan or selection.extra is not None else _on_grid(encoded, selection)
    return Result(name, answer.strip(), float(kept), flops, spent, patches, _map(pruner, encoded, keep_ratio))


def _on_grid(encoded: Encoded, selection: TokenSelection) -> Mask:
    return analysis._on_grid(encoded, 0, selection.keep[0])


def _map(pruner: Pruner | LayerPruner, encoded: Encoded, keep_ratio: float) -> NDArray[np.floating[Any]] | None:
    """The policy's probabilities."""
    if not isinstance(pruner, LearnedPruner):
        return None
    return analysis._on_grid(encoded, 0, pruner.logits(pruner.observe(encoded), keep_ratio).sigmoid()[0]).astype(float)


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
