"""One sentence for what went wrong before the work began, or with the disk."""

import re
from collections.abc import Callable, Sequence
from errno import EDQUOT, ENOSPC
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tprl.build import choices
from tprl.commands.stages import BUILT_FROM
from tprl.errors import UserError
from tprl.runtime import run_directory
from tprl.runtime.quoting import MODULE, in_short

OVERRIDDEN = re.compile(r"Could not override '([^']+)'")  # how Hydra names the option


def explain(error: BaseException, of_system: Callable[[OSError], str] | None = None) -> str | None:
    """One sentence for what went wrong before the work began, or for a UserError; None for anything
    else.

    Args:
        error: what was raised.
        of_system: the sentence for a file or folder that the system refuses; None: for one that
            cannot be written, which is what a command does before its work.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        reason = _line(error.message.partition("See http")[0])
        return (
            f"the option {error.override!r} cannot be read ({reason}); "
            "write key=value, special characters in quotes."
        )
    # Hydra wraps errors of OmegaConf and of the system: the first cause that we know speaks.
    chain = _chain(error)
    for cause in chain:
        # `stage.x` was looked up in the block `module`, which the user did not type
        if isinstance(cause, OmegaConfBaseException) and OmegaConf.is_dict(cause.parent_node):
            return _unknown_stage_option(chain) if cause.key == MODULE else _unknown_key(cause)
        if isinstance(cause, OSError):
            return (of_system or _of_system)(cause)
    hydra_made = (HydraException, OmegaConfBaseException)
    return next((_line(str(e)) for e in chain if isinstance(e, hydra_made)), None)


def _missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _line(str(error))
    return (
        f"{group}={name} does not exist; choose one of: "
        f"{', '.join(choices(group)) or '(an empty group)'}."
    )


def _unknown_stage_option(chain: Sequence[BaseException]) -> str:
    """A hyper-parameter was given to a stage that has none of its own, because it is a chain of
    stages."""
    option = next(match[1] for cause in chain if (match := OVERRIDDEN.search(str(cause))))
    name = in_short(option).removeprefix("stage.")
    return _of_group(f"stage.{name}") or (
        f"stage.{name} is not a key here, because stage=all runs several stages: name "
        f"the stage, as in stage.ppo.{name}=..., or choose one of them, as in stage=ppo."
    )


def _of_group(option: str) -> str | None:
    """For what a stage is built from, typed as an option of it: its group."""
    first, _, name = option.partition(".")
    group = BUILT_FROM.get(name.rpartition(".")[2], "") if first == "stage" else ""
    if not (group and choices(group)):
        return None
    listed = ", ".join(choices(group))
    return f"{option} is a group of its own: write {group}=<choice>, one of: {listed}."


def _unknown_key(error: OmegaConfBaseException) -> str:
    where = in_short(str(error.full_key or error.key))
    if sentence := _of_group(where):
        return sentence
    parent = where.rpartition(".")[0]
    keys = sorted(str(key) for key in error.parent_node or () if key != "hydra")
    return (
        f"{where} is not a key here; {f'{parent} has' if parent else 'there are'}: "
        f"{', '.join(keys) or 'none'} (+{where}=... adds an argument that the yaml does not list)."
    )


def _of_system(error: OSError) -> str:
    return unreadable(error) if error.errno is None else unwritable(error)


def unreadable(error: OSError) -> str:
    """A file that is not there or may not be read; libraries raise OSErrors of their own words,
    too."""
    if error.filename is None:
        return (
            f"{_line(str(error)).rstrip('.') or type(error).__name__}: "
            "check the paths and names of this command."
        )
    return (
        f"cannot read {error.filename} ({error.strerror}): "
        "check the path, and that you may read it."
    )


def unwritable(error: OSError, directory: Path | None = None, again: str = "") -> str:
    where = error.filename or directory or "the output folder"
    # A full disk ends a run that can go on; other refusals come before anything was computed.
    if (
        directory is not None
        and error.errno in (EDQUOT, ENOSPC)
        and run_directory.interrupted(directory)
    ):
        return (
            f"cannot write to {where} ({error.strerror}); what had been saved "
            f"there before is whole: free some space and go on with {again}."
        )
    return (
        f"cannot write to {where} ({error.strerror}); "
        "choose another folder with hydra.run.dir=<folder> (in a sweep hydra.sweep.dir=<folder>)."
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    return [error, *_chain(error.__cause__ or error.__context__)] if error else []


def _line(text: str) -> str:
    return " ".join(text.split())
