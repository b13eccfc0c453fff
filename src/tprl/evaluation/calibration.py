"""Calibrations of pruners: scores of held-out questions at every setting, kept as json beside the
pruner, from which `retention=0.98` chooses how many tokens live."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tprl.errors import UserError
from tprl.evaluation.retention import Trials, smallest
from tprl.lvlm.layer_drop import LayerPruner
from tprl.lvlm.recognition import model_print
from tprl.pruners.adaptive import Adaptive
from tprl.pruners.folder import CALIBRATIONS
from tprl.pruners.keep_all import KeepAll
from tprl.runtime.files import Damaged, read_sealed, write_sealed
from tprl.scoring.identity import of_weights
from tprl.types import Pruner

log = logging.getLogger(__name__)
ANY = Pruner | LayerPruner
# Prices of a token, in answer probability for all of them: none, then ten steps per decade. They
# are the same for everybody, since settings that follow from the questions would void the promise.
PRICES = (0.0, *(float(price) for price in np.logspace(-4, 1, 51)))
AGAIN = "python -m src.eval mode=calibrate"


class Served(NamedTuple):
    """What keeps a promise: the pruner to serve with, its keep ratio (None: it decides alone), and
    the mean kept fraction on the calibration questions."""

    pruner: ANY
    keep_ratio: float | None
    kept: float


@dataclass(frozen=True)
class Calibration:
    """Scores of N questions with all tokens, and at K kept fractions.

    Attributes:
        about: what it belongs to: pruner, model, dataset.
        keep_ratios: kept fractions, ascending.
        images: number of the image of each question.
        full: [N] scores with all tokens.
        pruned: [N K] scores.
        forecasts: [N K] what the budget head of an adaptive pruner forecasts, else empty.
        agreement: scores compare with the answer with all tokens, not with a reference.
    """

    about: Mapping[str, Any]
    keep_ratios: Sequence[float]
    images: Sequence[int]
    full: Sequence[float]
    pruned: Sequence[Sequence[float]]
    forecasts: Sequence[Sequence[float]] = field(default_factory=list)
    agreement: bool = False

    def serve(self, pruner: ANY, retention: float, confidence: float) -> Served:
        """The pruner with the fewest tokens that keep the promise; all of them where no setting
        does.

        Raises:
            UserError: numbers outside their range, or too few questions.
        """
        # Settings go from most tokens to fewest, the order in which the test may stop.
        trials, kept = self.trials
        setting = smallest(trials, retention, confidence).setting
        if setting is None:
            sentence = "%s: only all tokens keep retention=%g with confidence=%g"
            log.warning(sentence, pruner.name, retention, confidence)
            return Served(KeepAll(), 1.0, 1.0)
        # An adaptive pruner is served at a price, any other at a ratio; ratios are stored
        # ascending.
        if isinstance(pruner, Adaptive):
            return Served(Adaptive(pruner.pruner, PRICES[setting]), None, kept[setting])
        return Served(pruner, self.keep_ratios[::-1][setting], kept[setting])

    @property
    def trials(self) -> tuple[Trials, list[float]]:
        """The settings from most tokens to fewest, and the mean kept fraction of each. Of an
        adaptive pruner they are prices: what a question scores at a price is what it scored at the
        budget that it buys."""
        pruned, ratios = np.array(self.pruned, dtype=float), np.array(self.keep_ratios)
        # [N P] the score at a price is the score at the budget that the question buys there.
        if self.forecasts:
            bought = bought_at(np.array(self.forecasts), ratios)
            rows = np.arange(len(pruned))[:, None]
            pruned, kept = pruned[rows, bought], ratios[bought].mean(0).tolist()
        else:
            pruned, kept = pruned[:, ::-1], ratios[::-1].tolist()
        full = np.array(self.full, dtype=float)
        return Trials(np.array(self.images), full, pruned, self.agreement), kept

    def check(self, lvlm_model: Any, pruner: ANY, dataset: str | None = None) -> None:
        """Refuse a calibration that says nothing of this model, pruner or dataset.

        Raises:
            UserError: it was made with another.
        """
        # From the pruner to the data: the first mismatch is what the user has to mend.
        name, model = self.about["pruner"]["name"], self.about["model"]
        if self.about["pruner"] != identity(pruner):
            raise UserError(
                f"this calibration is of another state of pruner {name}, or other settings of it: "
                f"make one by `{AGAIN}`."
            )
        if model["print"] != model_print(lvlm_model):
            raise UserError(
                f"pruner {name} was calibrated on other weights than this model's (on "
                f"{model['name']}): calibrate it on this one by `{AGAIN} model=...`."
            )
        if dataset is not None and dataset != self.about["dataset"]:
            raise UserError(
                f"pruner {name} was calibrated on questions of {self.about['dataset']}, and these "
                f"are of {dataset}: calibrate it there by `{AGAIN} dataset={dataset}`."
            )

    def save(self, path: Path) -> None:
        """Write it as json, complete or not at all."""
        write_sealed(path, json.dumps(asdict(self), separators=(",", ":")) + "\n")


def bought_at(forecasts: Float[ndarray, "N K"], ratios: Float[ndarray, " K"]) -> ndarray:
    """[N P] number of the budget that each question buys at every one of `PRICES`, as
    `adaptive.choose` does: the first with the largest forecast less its price."""
    # float32, in which the pruner compares: near ties must fall as they do there.
    forecast, kept = forecasts.astype(np.float32), ratios.astype(np.float32)
    columns = []
    for price in PRICES:
        columns.append((forecast - np.float32(price) * kept).argmax(1))
    return np.stack(columns, 1)


def identity(pruner: Any) -> dict[str, Any]:
    """What tells pruners apart: name, settings, weights and way of serving. Seeds of methods that
    draw do not count."""
    # An adaptive mode goes by its policy. Weights and serving identify a policy, settings a rule.
    learned = pruner.learned
    plain = (str, float, int, tuple)
    settings = vars(pruner) if learned.serving is None else {}
    return {
        "name": pruner.name,
        "settings": {
            name: repr(value)
            for name, value in sorted(settings.items())
            if isinstance(value, plain) and name != "seed"
        },
        "weights": of_weights(learned),
        "serving": repr(learned.serving),
    }


def file_of(pruner: ANY) -> str:
    """The name of the calibration of a pruner; the adaptive mode of a policy shares its folder."""
    return CALIBRATIONS[isinstance(pruner, Adaptive)]


def home_of(pruner: Any) -> Path | None:
    """The folder that a learned pruner was loaded from; None for methods that have none."""
    return pruner.learned.folder


def calibration_of(pruner: ANY, folder: str | Path | None = None) -> Calibration:
    """The calibration in a folder, or beside the pruner.

    Args:
        folder: what `mode=calibrate` printed as `run:`, or a pruner's folder; None: the pruner's.

    Raises:
        UserError: there is none, or it is damaged.
    """
    # A run of mode=calibrate has a folder per pruner, a pruner's own folder holds the file itself.
    if folder is None:
        home = home_of(pruner)
        places = [] if home is None else [home / file_of(pruner)]
    else:
        places = [Path(folder) / pruner.name / file_of(pruner), Path(folder) / file_of(pruner)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        where = f" in {folder}" if folder is not None else ""
        raise UserError(
            f"pruner {pruner.name} has no calibration{where} to choose its tokens by: make one by "
            f"`{AGAIN} run=<its run>` (or pruner=...), or give keep_ratio instead of retention."
        )
    return read_calibration(path)


def read_calibration(path: Path) -> Calibration:
    """What `Calibration.save` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        # Shapes are checked here, because a wrong shape would end in a wrong promise, not in an
        # error.
        calibration = Calibration(**json.loads(read_sealed(path)))
        shape = np.array(calibration.pruned, dtype=float).shape
        if shape != (len(calibration.full), len(calibration.keep_ratios)):
            raise Damaged(f"it has {shape} scores")
        if len(calibration.images) != len(calibration.full):
            raise Damaged(f"it has {len(calibration.images)} images")
        forecasts = np.array(calibration.forecasts, dtype=float).shape
        if calibration.forecasts and forecasts != shape:
            raise Damaged(f"it has {forecasts} forecasts")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again, or run `{AGAIN}`.") from error
    return calibration
