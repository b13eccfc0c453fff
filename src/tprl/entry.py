"""What both command lines share: one sentence per user error, `run: <directory>`, sweeps that can be started again."""

import json
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from errno import EACCES, EDQUOT, EEXIST, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tprl.build import choices, conf_dir
from tprl.errors import UserError
from tprl.terminal import next_command, register_resolvers

Work = Callable[[DictConfig, Path], Path]
UNWRITABLE = {EACCES, EDQUOT, EEXIST, ENOSPC, ENOTDIR, EPERM, EROFS}
COMPONENTS = ("model", "pruner", "policy", "dataset", "reward")  # groups whose yamls describe one object
log = logging.getLogger(__name__)


def launch(name: str, work: Work) -> None:
    """Compose `<name>.yaml` with the command line and do the work, once per job.

    Bad input ends in one line on stderr and exit status 2. With HYDRA_FULL_ERROR=1 it ends in a traceback instead.
    """
    sys.argv[1:] = [addable(word) for word in sys.argv[1:]]
    full = os.environ.get("HYDRA_FULL_ERROR") == "1" and _main_process()  # ranks inherit it from the line below
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, rather than print its own several lines and exit
    bugs: list[Exception] = []
    sweeps: set[str] = set()
    register_resolvers()

    def task(config: DictConfig) -> None:
        try:
            directory = job(work, config)
            if _main_process():
                print(f"run: {directory}", flush=True)
                sweeps.update(_say_next(name, config, directory))
        except UserError as error:
            if full or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            _exit(str(error))  # here, because Hydra would add a line of its own
        except Exception as error:
            bugs.append(error)
            raise

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(task)()
    except Exception as error:
        sentence = None if full or error in bugs else explain(error)
        if sentence is None:
            raise
        _exit(sentence)
    finally:
        for sweep in sweeps:  # also after a job that failed
            print(f"next: python -m src.eval sweep={sweep}", flush=True)
        if not full:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _say_next(name: str, config: DictConfig, directory: Path) -> list[str]:
    """Print what to type after this job; of a sweep return its directory, for the end."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return [shlex.quote(str(settings.sweep.dir))] if name == "train" else []
    if command := next_command(name, config, list(settings.overrides.task), directory):
        print(f"next: {command}", flush=True)
    return []


def addable(word: str) -> str:
    """`model.placement=shard` as `++model.placement=shard`: yamls list what differs from a class's defaults, and any
    argument of the class can be set. `build` refuses what is none."""
    key, equals, _ = word.partition("=")
    return f"++{word}" if equals and "." in key and key.partition(".")[0] in COMPONENTS else word


def job(work: Work, config: DictConfig) -> Path:
    """One job in Hydra's output directory: skipped if a sweep has finished it before; leaves `done.json` or `FAILED`.

    Raises:
        UserError: the directory holds a finished job with other settings, or cannot be written.
    """
    settings = HydraConfig.get()
    directory = Path(settings.runtime.output_dir)
    sweep, overrides = settings.mode == RunMode.MULTIRUN, list(settings.overrides.task)
    if sweep:
        _refuse_ddp(config)
        if _finished(directory, overrides):
            log.info("skipped, finished before: %s", directory)
            return directory
    started = time.monotonic()
    try:
        result = work(config, directory)
    except BaseException as error:
        if isinstance(error, Exception):
            _failed(directory, error, sweep)
        _finish_wandb(1)
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise UserError(_unwritable(error)) from error
        raise
    if _main_process():
        (directory / "FAILED").unlink(missing_ok=True)
        record = {"overrides": overrides, "finished": time.strftime("%F %T%z"), "seconds": time.monotonic() - started}
        (directory / "done.json").write_text(json.dumps(record, indent=1) + "\n")
    _finish_wandb(0)
    return result


def chosen(key: str) -> bool:
    """Whether the command line of this job sets `key` (a group or a value) or something below it."""
    names = [text.partition("=")[0].lstrip("+~").partition("@")[0] for text in HydraConfig.get().overrides.task]
    return any(name == key or name.startswith((f"{key}.", f"{key}/")) for name in names)


def explain(error: BaseException) -> str | None:
    """One sentence for what went wrong before the work began, or for a UserError; None for anything else."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if isinstance(error, OverrideParseException):
        reason = _line(error.message.partition("See http")[0])
        return (
            f"the option {error.override!r} cannot be read ({reason}); write key=value, special characters in quotes."
        )
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException) and OmegaConf.is_dict(cause.parent_node):
            return _unknown_key(cause)
        if isinstance(cause, OSError):
            return _unwritable(cause)
    hydra_made = (HydraException, OmegaConfBaseException)
    return next((_line(str(e)) for e in chain if isinstance(e, hydra_made)), None)


def _missing(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _line(str(error))
    return f"{group}={name} does not exist; choose one of: {', '.join(choices(group)) or '(an empty group)'}."


def _unknown_key(error: OmegaConfBaseException) -> str:
    where = str(error.full_key or error.key)
    parent = where.rpartition(".")[0]
    keys = sorted(str(key) for key in error.parent_node or () if key != "hydra")
    return (
        f"{where} is not a key here; {f'{parent} has' if parent else 'there are'}: {', '.join(keys) or 'none'}"
        f" (+{where}=... adds an argument that the yaml does not list)."
    )


def _unwritable(error: OSError) -> str:
    return (
        f"cannot write to {error.filename or 'the output folder'} ({error.strerror}); "
        "choose another folder with hydra.run.dir=<folder> (in a sweep hydra.sweep.dir=<folder>)."
    )


def _finished(directory: Path, overrides: list[str]) -> bool:
    marker = directory / "done.json"
    if not marker.exists():
        return False
    before = json.loads(marker.read_text())["overrides"]
    if before != overrides:
        raise UserError(
            f"{directory} holds a finished job with other settings ({' '.join(before)}); "
            "choose another folder with hydra.sweep.dir=<folder>."
        )
    return True


def _failed(directory: Path, error: Exception, sweep: bool) -> None:
    """Say so at once: Hydra reports an error of a sweep only after its last job."""
    if sweep:
        log.error("FAILED %s: %s", directory, error)
    if _main_process() and os.access(directory, os.W_OK):
        (directory / "FAILED").write_text("".join(traceback.format_exception(error)))


def _finish_wandb(status: int) -> None:
    """Close the run, if there is one: the next job of a sweep would go on with it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=status)


def _refuse_ddp(config: DictConfig) -> None:
    # Lightning starts its other ranks with the whole sweep as command line, and they write elsewhere.
    if str(OmegaConf.select(config, "trainer.strategy", default="")) == "ddp":
        raise UserError("a sweep cannot run trainer.strategy=ddp in one process tree; start one command per job.")


def _main_process() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _chain(error: BaseException | None) -> list[BaseException]:
    return [error, *_chain(error.__cause__ or error.__context__)] if error else []


def _line(text: str) -> str:
    return " ".join(text.split())


def _exit(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
