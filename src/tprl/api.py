"""Pruning on a stock Hugging Face model: `tprl.prune(model, pruner, keep_ratio=1/3)`, then
`model.generate` as ever."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from tprl.budget import check_keep_ratio
from tprl.build import choices, target_of
from tprl.errors import UserError
from tprl.evaluation.calibration import calibration_of
from tprl.evaluation.retention import check_share
from tprl.lvlm.adapters import add_adapter
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPruner
from tprl.lvlm.pruned import Pruning
from tprl.lvlm.questions import QuestionFinder
from tprl.lvlm.wrappers import stock_model
from tprl.pruners.base import checked_pruner, named_pruner
from tprl.pruners.learned import LearnedPruner, check_family, check_width
from tprl.runtime.hub import within_reach
from tprl.types import Pruner

CONFIDENCE = 0.9  # that a calibration gives of a retention


def prune(
    model: Any,
    pruner: Pruner | LayerPruner | str,
    keep_ratio: float | None = None,
    *,
    threshold: float | None = None,
    retention: float | None = None,
    confidence: float = CONFIDENCE,
    calibration: str | Path | None = None,
    adapter: str | Path | None = None,
    reuse_images: bool = False,
    processor: Any = None,
    positions: str = "keep",
) -> Pruning:
    """Make a stock model's own `generate(**processor(...))` prune visual tokens: same inputs, same
    outputs.

    Vision tower and projector run as ever; the language model reads the kept tokens only, in
    prefill and in every decoding step. Prompts without images pass through untouched. `model(...)`
    itself is not changed.

    Args:
        model: an LVLM of transformers whose class TPRL knows (docs/lvlms.md), or a wrapper around
            one (peft with LoRA, `torch.compile`, DistributedDataParallel): then the model inside is
            pruned.
        pruner: a `Pruner`, or the name of one (`conf/pruner/*.yaml`), such as "random".
        keep_ratio: fraction of each image's visual tokens to keep, in (0, 1]; for "tprl_adaptive"
            the mean over questions.
        threshold: instead of a keep_ratio, keep every token whose keep probability is above it; for
            policies that were trained with free budgets.
        retention: instead of a keep_ratio, as few tokens as keep this share, in (0, 1], of the
            accuracy with all tokens: on average over questions like those of the pruner's
            calibration (`python -m src.eval mode=calibrate`).
        confidence: in (0, 1), that a calibration gives of it.
        calibration: the directory of that command; by default what lies beside the pruner.
        adapter: a run of `stage=tune`, or its `adapter/`: the language model reads pruned prompts
            with it until `undo()`; weights are not changed.
        reuse_images: images of the call before are not encoded again, for a conversation about
            them: each turn is pruned anew for its question. Give the whole conversation with its
            images in every turn; the vision side of the model must not change meanwhile.
            `past_key_values` of the turn before is then used as far as both pruned prompts begin
            alike, and refused with the reason where they share nothing of an image.
        processor: the model's processor or tokenizer, for pruners that read the question; by
            default the one that belongs to the weights that the model was loaded from.
        positions: "keep" leaves survivors at their places, "compact" closes the gaps.

    Returns:
        A handle: `undo()` restores the model exactly, as does leaving a `with` block; `kept` says
        what was kept. See `lvlm.pruned.Pruning`.

    Raises:
        UserError: a model without image tokens that we know, a wrapper whose model inside cannot be
            pruned, a pruner made for another one, a ratio outside (0, 1], a retention without
            calibration, with that of another model, or one from too few questions, or an adapter of
            another model.
    """
    if positions not in ("keep", "compact"):
        raise UserError(f"positions must be keep or compact, got {positions}.")
    # Checks first, from the cheapest on: a model that is refused stays as it was.
    stock = stock_model(model)
    lvlm = family_of(stock).around(stock, processor)
    # The adapter is the first change to the model: whatever is refused below takes it off again.
    take_off = None if adapter is None else add_adapter(stock, adapter)
    try:
        built = _built(pruner)
        if retention is not None:
            _check_alone(retention, keep_ratio=keep_ratio, threshold=threshold)
            if positions != "keep":  # calibrations are made with survivors at their places
                raise UserError(
                    f"retention={retention} is calibrated for positions=keep, got "
                    f"positions={positions}: use positions=keep."
                )
            scored = calibration_of(built, calibration)
            # With its adapter: the promise is of these weights.
            scored.check(stock, built)
            built, keep_ratio, _ = scored.serve(built, retention, confidence)
        else:
            _check_unpromised(confidence, calibration)
            built, keep_ratio = _settled(built, keep_ratio, threshold)
        pruning = _pruning(lvlm, built, keep_ratio, positions, model)
        if reuse_images:
            pruning.remember_images()
    except Exception:
        if take_off is not None:
            take_off()
        raise
    pruning.take_off = take_off
    return pruning


def _built(pruner: Any) -> Any:
    """A pruner, by name or as it is."""
    if not isinstance(pruner, str):
        return checked_pruner(pruner, f"pruner={type(pruner).__name__}")
    if pruner not in choices("pruner"):
        raise UserError(
            f"pruner={pruner} does not exist; choose one of: {', '.join(choices('pruner'))}, "
            "or give what tprl.Pruner.from_pretrained(folder or hub id) returns."
        )
    return named_pruner(pruner)


def _settled(
    pruner: Any, keep_ratio: float | None, threshold: float | None
) -> tuple[Any, float | None]:
    """The pruner and its keep ratio, once it is sure that something decides how many tokens
    live."""
    if keep_ratio is not None:
        keep_ratio = check_keep_ratio(keep_ratio)
    # A threshold decides alone: `_with_threshold` refuses a ratio beside it.
    if threshold is not None:
        return _with_threshold(pruner, keep_ratio, threshold), keep_ratio
    if keep_ratio is None and not pruner.decides_alone:
        raise UserError(
            f"{pruner.name} needs a kept fraction of the visual "
            "tokens: give keep_ratio in (0, 1], e.g. 1/3."
        )
    return pruner, keep_ratio


def _pruning(
    lvlm: FrozenLVLM, pruner: Any, keep_ratio: float | None, positions: str, wrapper: Any
) -> Pruning:
    """The stock model inside `lvlm` with its `generate` replaced; `wrapper` is what prune got."""
    model = lvlm.model
    _check_fit(pruner, lvlm)
    reads_question = pruner.reads_question
    if isinstance(pruner, LayerPruner) and keep_ratio is not None:
        lvlm.check_layers(pruner.name)
        pruner.stages(keep_ratio, lvlm.layers)  # refused now, if no schedule has this mean
    # A second pruning would wrap the first, and undo() would restore the wrong one.
    if isinstance(model.generate, Pruning):
        raise UserError(
            "this model is pruned already: call undo() on the handle that prune returned first."
        )
    # Only pruners that read questions need a processor, and finding it may take the hub.
    finder = None
    if reads_question:
        if lvlm.processor is None:
            lvlm = type(lvlm).around(model, _processor(lvlm, pruner.name))
        finder = QuestionFinder(lvlm.processor, lvlm.image_token, lvlm.placeholder)
    # Some wrappers hold a bound copy of `generate`, which no longer asks the model for it.
    pruning = Pruning(lvlm, pruner, keep_ratio, finder, positions)
    if (
        wrapper is not model
        and getattr(getattr(wrapper, "generate", None), "__self__", None) is model
    ):
        pruning.undo()
        raise UserError(
            f"{type(wrapper).__name__} still calls the generate that its model had before prune, "
            "so nothing would be pruned: prune the stock model, and wrap it afterwards."
        )
    return pruning


def _check_alone(retention: float, **others: float | None) -> None:
    """Refuse a retention beside what else decides how many tokens live."""
    check_share("retention", retention)
    for name, value in others.items():
        if value is not None:
            raise UserError(
                f"{name}={value} and retention={retention} contradict each other: give one of them."
            )


def _check_unpromised(confidence: float, calibration: str | Path | None) -> None:
    """Refuse what only a retention reads where none is asked for."""
    for name, value, default in (
        ("confidence", confidence, CONFIDENCE),
        ("calibration", calibration, None),
    ):
        if value != default:
            raise UserError(
                f"{name}={value} is not read without a retention: give retention, e.g. 0.98, or "
                f"leave {name} out."
            )


def family_of(model: Any) -> type[FrozenLVLM]:
    """The class that knows this model's family, by the `model_type` of its config.

    Raises:
        UserError: there is none.
    """
    # conf/model is the list of families: a new yaml is known here too.
    targets = [target_of("model", name) for name in choices("model")]
    known = {target.model_type: target for target in targets if issubclass(target, FrozenLVLM)}
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in known:
        raise UserError(
            f"{type(model).__name__} (model_type {kind}) has no image tokens "
            f"that TPRL knows how to prune: it knows {', '.join(sorted(known))}."
        )
    return known[kind]


def _with_threshold(pruner: Any, keep_ratio: float | None, threshold: float) -> LearnedPruner:
    """The same pruner with another threshold; the given one keeps its own."""
    if keep_ratio is not None:
        raise UserError(
            f"keep_ratio={keep_ratio} and threshold={threshold} "
            "contradict each other: give one of them."
        )
    if not isinstance(pruner, LearnedPruner) or "threshold_ratio" not in pruner.trained_on:
        raise UserError(
            f"pruner {pruner.name} was not trained with free budgets, so threshold={threshold} has "
            "no meaning: give keep_ratio, or use pruner='tprl_adaptive' for budgets per question."
        )
    if not 0 <= threshold < 1:
        raise UserError(
            f"threshold must be a keep probability in [0, 1), got {threshold}; use e.g. 0.5."
        )
    # Weights are shared, settings of serving are not.
    other = copy.copy(pruner)
    other.serving = replace(pruner.serving, tau=float(threshold))
    return other


def _check_fit(pruner: Any, lvlm: FrozenLVLM) -> None:
    lvlm.check_extras(frozenset(pruner.extras), lvlm.known_extras)
    check_family(pruner, lvlm)
    check_width(pruner, lvlm.width)


def _processor(lvlm: FrozenLVLM, name: str) -> Any:
    """The processor that belongs to the weights that the model was loaded from."""
    # Asked only where it is at hand: without a network the hub would be tried for minutes.
    source = getattr(lvlm.model, "name_or_path", "")
    why = "it was not loaded from a folder or the hub"
    if source and within_reach(source):
        try:
            return lvlm.load_processor(source)
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
    raise UserError(
        f"{name} reads the question, and this model's "
        f"processor is not there ({why}): give processor=..."
    )
