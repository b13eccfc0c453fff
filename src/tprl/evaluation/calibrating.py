"""How calibrations are made: held-out questions, answered with all tokens and at every setting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tprl.data.base import BaseDataset
from tprl.data.taking import batches, nothing_left
from tprl.errors import UserError
from tprl.evaluation.calibration import ANY, Calibration, identity
from tprl.evaluation.statistics import image_key
from tprl.lvlm.recognition import model_print
from tprl.pruners.adaptive import Adaptive
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.learned import check_family
from tprl.scoring.ahead import Ready
from tprl.scoring.at_ratio import scored_at
from tprl.scoring.scorer import Agreement, Scorer
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Sample, TokenSelection

SCORE = frozenset({"score"})
DIGITS = 8  # of scores and forecasts that are kept: as many as float32 has


@dataclass
class _Arm:
    """A pruner, and what was found out about it."""

    pruner: ANY
    keep_ratios: Sequence[float]
    scores: list[list[float]] = field(default_factory=list)
    forecasts: list[list[float]] = field(default_factory=list)

    @property
    def selector(self) -> Any:
        """What selects at each of the ratios."""
        adaptive = isinstance(self.pruner, Adaptive)
        return _AtBudgets(self.pruner) if adaptive else self.pruner  # type: ignore[arg-type]


class _AtBudgets:
    """An adaptive pruner that gives every question the same budget."""

    def __init__(self, adaptive: Adaptive) -> None:
        self.name, self.extras, self.adaptive = adaptive.name, adaptive.extras, adaptive

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        assert keep_ratio is not None
        return self.adaptive.at_budget(encoded, keep_ratio)


def calibrate(
    lvlm: Any,
    dataset: BaseDataset,
    pruners: Sequence[ANY],
    keep_ratios: Sequence[float],
    limit: int | None,
    batch_size: int = 32,
    labels: bool = True,
    split: str = "",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Calibration]:
    """Score the first `limit` questions with all tokens, and with every pruner at every ratio; an
    adaptive one at its own budgets.

    Args:
        labels: False takes what the model answers with all tokens for right.
        split: of the dataset, for the record.
        tick: called with (done, total) after each batch.

    Raises:
        UserError: a pruner of another family, or no question is left.
    """
    # A pruner of another family is refused here, before the first question is encoded.
    arms = []
    for pruner in pruners:
        check_family(pruner, lvlm)
        ratios = pruner.budgets if isinstance(pruner, Adaptive) else sorted(keep_ratios)
        arms.append(_Arm(pruner, ratios))
    # One encoding serves every pruner, so it carries what any of them reads.
    extras = frozenset().union(*(pruner.extras for pruner in pruners))
    full: list[float] = []
    keys: list[str] = []
    total = min(limit or len(dataset), len(dataset))
    # All tokens and all arms share the encoding of a batch, the costly part.
    for samples in batches(dataset, total, batch_size):
        encoded = Ready(samples).encode_in_parts(lvlm, extras)
        scorer, asked = _scorer(lvlm, dataset, samples, encoded, labels)
        full += _scores(scorer, asked, encoded, KeepAll(), 1.0)
        keys += [image_key(sample.uid) for sample in samples]
        for arm in arms:
            _score(arm, scorer, asked, encoded)
        tick(len(keys), total)
    if not keys:
        raise nothing_left(dataset, total, "to calibrate on")
    # The test needs to know which questions share an image, not what the image is called.
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    images = [numbers[key] for key in keys]
    # What a calibration belongs to; `Calibration.check` refuses to serve anything else.
    model = {"name": lvlm.name, "print": model_print(lvlm.identified)}
    about = {"model": model, "dataset": dataset.name, "split": split}
    calibrations = []
    for arm in arms:
        what = {"pruner": identity(arm.pruner), **about}
        calibrations.append(
            Calibration(
                what,
                list(arm.keep_ratios),
                images,
                full,
                arm.scores,
                arm.forecasts,
                agreement=not labels,
            )
        )
    return calibrations


def _scorer(
    lvlm: Any, dataset: BaseDataset, samples: list[Sample], encoded: Encoded, labels: bool
) -> tuple[Scorer, list[Sample]]:
    """Who scores these questions, and the questions with the answers that count as right."""
    if labels:
        return Scorer(lvlm, dataset, SCORE), samples
    # Without labels the unpruned answers become the references, by which pruned answers are scored.
    answers = lvlm.answer(splice(encoded, keep_all(encoded)))
    relabelled = Agreement(samples, answers)
    return Scorer(lvlm, relabelled, SCORE), relabelled.samples


def _scores(
    scorer: Scorer, samples: list[Sample], encoded: Encoded, pruner: ANY, ratio: float
) -> list[float]:
    scored, _, _ = scored_at(scorer, samples, encoded, pruner, ratio)
    return [round(score, DIGITS) for score in scored.score.tolist()]


def _score(arm: _Arm, scorer: Scorer, samples: list[Sample], encoded: Encoded) -> None:
    """One row per question, with a column per ratio."""
    selector = arm.selector
    # [K][B] from the pruner, one column per ratio; stored by question, [B][K].
    columns = []
    for ratio in arm.keep_ratios:
        columns.append(_scores(scorer, samples, encoded, selector, ratio))
    arm.scores += [list(row) for row in zip(*columns, strict=True)]
    if isinstance(arm.pruner, Adaptive):
        # Forecasts decide at serving time which of the budgets a question buys.
        for row in arm.pruner.forecasts(encoded).tolist():
            arm.forecasts.append([round(chance, DIGITS) for chance in row])


def check_labels(dataset: BaseDataset, labels: bool) -> None:
    """Refuse to compare with reference answers that a dataset does not have.

    Raises:
        UserError: it has none.
    """
    if labels and not dataset.labelled:
        raise UserError(
            f"dataset {dataset.name} has no answers: set calibrate.labels=false, "
            "which takes the answers with all tokens for right."
        )
