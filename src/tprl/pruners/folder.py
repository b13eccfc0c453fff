"""The folder of a trained pruner: where it is, and what its files hold."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from tprl.errors import UserError
from tprl.runtime import hub
from tprl.runtime.files import SUMS, Damaged, read_sealed, write_sealed
from tprl.runtime.run_directory import EDITED, other_pruner

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# how `retention=` chooses, of the pruner and of its adaptive mode (`evaluation.calibration`)
CALIBRATIONS = ("retention.json", "retention_adaptive.json")
log = logging.getLogger(__name__)
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def find_pruner(pretrained: str | Path, revision: str | None = None) -> Path:
    """The folder with the weights: one that ships with TPRL, a run directory's `pruner/`, the
    folder itself, or what the hub has under that id.

    Raises:
        UserError: no such folder, or no weights in it.
    """
    # What ships comes first, then a run, then a plain folder; only an unknown name asks the hub.
    places = [ASSETS / pretrained, Path(pretrained) / "pruner", Path(pretrained)]
    folder = next((place for place in places if (place / CONFIG).is_file()), Path(pretrained))
    # Only what looks like owner/name and is not here is asked of the hub.
    if not folder.exists() and str(pretrained).count("/") == 1:
        folder = hub.fetch(
            str(pretrained), (WEIGHTS, CONFIG, CARD, *CALIBRATIONS, f"{SUMS}/*"), revision
        )
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: give the directory that a training run printed as `run:`."
        )
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no trained pruner ({CONFIG} and {WEIGHTS}): finish its run, or give "
            "another directory."
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a pruner's folder.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return {"trained_on": {}, **json.loads(read_sealed(folder / CONFIG))}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG} is damaged ({error}): {other_pruner(folder)}{EDITED}."
        ) from error


def copy_calibrations(source: Path, folder: Path, same: Callable[[Path, Path], bool]) -> None:
    """Put the calibrations of the pruner in `source` beside that in `folder`, if `same` says that
    both have the same weights and settings; says where they have not.

    Raises:
        UserError: a calibration is damaged.
    """
    names = [name for name in CALIBRATIONS if (source / name).is_file()]
    if not names or source.resolve() == folder.resolve():
        return
    if not same(source, folder):
        log.warning(
            "%s of %s not copied to %s: the pruner has changed since it was calibrated; calibrate "
            "it again by `python -m src.eval mode=calibrate`",
            " and ".join(names),
            source,
            folder,
        )
        return
    for name in names:
        try:
            write_sealed(folder / name, read_sealed(source / name))
        except Damaged as error:
            raise UserError(f"{source / name} is damaged ({error}): copy it again.") from error


def load_weights(pruner: nn.Module, folder: Path) -> None:
    """Fill a pruner from its folder.

    Raises:
        UserError: the file is damaged, or belongs to another width.
    """
    try:
        state = load(read_sealed(folder / WEIGHTS))
    except (Damaged, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is damaged ({error}): {other_pruner(folder)}."
        ) from error
    # Shapes are compared here, because torch's own message names neither file nor remedy.
    expected = pruner.state_dict()
    for key, value in expected.items():
        if key not in state or state[key].shape != value.shape:
            shape = tuple(state[key].shape) if key in state else "nothing"
            raise UserError(
                f"{folder / WEIGHTS} does not fit this policy: "
                f"{key} is {shape}, {tuple(value.shape)} is needed; "
                "use the policy settings that it was trained with."
            )
    pruner.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected})
