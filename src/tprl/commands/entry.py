"""What both command lines share: one sentence per user error, `run: <directory>`, sweeps that can
be started again."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from errno import EACCES, EDQUOT, EEXIST, ENOSPC, ENOTDIR, EPERM, EROFS
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tprl.build import conf_dir
from tprl.commands.sentences import explain, unwritable
from tprl.commands.shell import command, option, value_of
from tprl.commands.stages import in_full, in_two_blocks
from tprl.commands.terminal import next_command, register_resolvers
from tprl.commands.unread import check_read
from tprl.errors import UserError
from tprl.runtime import run_directory
from tprl.runtime.files import write_atomically
from tprl.runtime.packages import check_torchvision
from tprl.runtime.quoting import in_short, quoted
from tprl.runtime.run_directory import DONE, FAILED, STARTED
from tprl.runtime.signals import Stopped, listening

Work = Callable[[DictConfig, Path], float | None]  # what it returns, a sweeper may optimize
UNWRITABLE = {EACCES, EDQUOT, EEXIST, ENOSPC, ENOTDIR, EPERM, EROFS}
# groups whose yamls describe one object
COMPONENTS = ("model", "pruner", "policy", "dataset", "reward", "scorer")
LONGEST_NAME = 128  # of a run in W&B
# torchrun or srun started this process, maybe among others
LAUNCHED = {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}
log = logging.getLogger(__name__)


def launch(name: str, work: "Work | str") -> None:
    """Compose `<name>.yaml` with the command line and do the work, once per job.

    `work` is a function, or `package.module:function`: it is then imported once the options are
    known to be good.

    Bad input ends in one line on stderr and exit status 2. With HYDRA_FULL_ERROR=1 it ends in a
    traceback instead. A signal ends in one line too, and status 130 (Ctrl-C) or 143 (SIGTERM).
    """
    if LAUNCHED & os.environ.keys():
        from tprl.runtime.distributed import join  # late: see src/train.py

        join()
    words = [addable(word) for word in sys.argv[1:]]
    try:
        sys.argv[1:] = _in_its_directory(words)
    except UserError as error:
        _exit(str(error))
    # ranks inherit it from the line below
    full = os.environ.get("HYDRA_FULL_ERROR") == "1" and _main_process()
    # makes Hydra raise, rather than print its own several lines and exit
    os.environ["HYDRA_FULL_ERROR"] = "1"
    bugs: list[Exception] = []
    sweeps: set[str] = set()
    register_resolvers()

    def task(config: DictConfig) -> float | None:
        try:
            result = job(work, config, words)
        except UserError as error:
            if full or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            _exit(str(error))  # here, because Hydra would add a line of its own
        except Exception as error:
            bugs.append(error)
            raise
        except Stopped as stop:
            _stop(name, stop)
        sweeps.update(_say_next(name, config))
        return result

    try:
        with listening():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(task)()
    except Exception as error:
        sentence = None if full or error in bugs else explain(error)
        if sentence is None:
            raise
        _exit(sentence)
    except Stopped as stop:
        _stop(name, stop)
    finally:
        for sweep in sweeps:  # also after a job that failed
            print(f"next: {command('eval', option('sweep', sweep))}", flush=True)
        if not full:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _say_next(name: str, config: DictConfig) -> list[str]:
    """Print where this job wrote, and what to type after it; of a sweep return its directory, for
    the end."""
    if not _main_process():
        return []
    settings = HydraConfig.get()
    directory = Path(settings.runtime.output_dir)
    print(f"run: {directory}", flush=True)
    if settings.mode == RunMode.MULTIRUN:
        return [str(settings.sweep.dir)] if name == "train" else []
    if line := next_command(name, config, list(settings.overrides.task), directory):
        print(f"next: {line}", flush=True)
    return []


def addable(word: str) -> str:
    """`model.placement=shard` as `++model.placement=shard`: yamls list what differs from a class's
    defaults, and any argument of the class can be set. `build` refuses what is none. Of a stage
    `module.` may be left out."""
    key, equals, _ = word.partition("=")
    component = equals and "." in key and key.partition(".")[0] in COMPONENTS
    return f"++{word}" if component else in_full(word)


def job(work: Work | str, config: DictConfig, words: Sequence[str] = ()) -> float | None:
    """One job in Hydra's output directory, alone there: skipped if it has been finished before,
    gone on with if it was interrupted; leaves `done.json` or `FAILED`. `words` is the command line
    as it was typed.

    Returns:
        The result of the work; where it was finished before, of that time.

    Raises:
        UserError: another process is at work in the directory, it holds a job with other settings,
            or it cannot be written.
    """
    settings = HydraConfig.get()
    directory, sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
    if sweep:
        _refuse_ddp(config)
    if not config.get("resume"):  # the settings of an interrupted run are not judged again
        check_read(settings.job.name, config, [option_of(text) for text in settings.overrides.task])
    try:
        # the other ranks are the same run
        with run_directory.locked(directory) if _main_process() else nullcontext():
            overrides, before = _before(config, words, directory, sweep)
            if before is None:
                return run_directory.result_of(directory)
            started = time.monotonic()
            try:
                check_torchvision()
                result = _main(work)(before, directory)
            except BaseException as error:
                if isinstance(error, Exception):
                    _failed(directory, error, sweep)
                _finish_wandb(1)
                raise
            if _main_process():
                run_directory.finish(directory, overrides, time.monotonic() - started, result)
            _finish_wandb(0)
            return result
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise UserError(unwritable(error, directory, _go_on(config, directory))) from error
        raise


def _main(work: Work | str) -> Work:
    """The function that `package.module:function` names, imported now; a function is itself."""
    if not isinstance(work, str):
        return work
    module, _, function = work.partition(":")
    return getattr(import_module(module), function)


def _before(
    config: DictConfig, words: Sequence[str], directory: Path, sweep: bool
) -> tuple[list[str], DictConfig | None]:
    """What was typed, and the config to work with: None where the job has been finished, and that
    of before where it was interrupted. The directory is marked as that of a run."""
    overrides = [
        in_short(text) for text in HydraConfig.get().overrides.task if option_of(text) != "resume"
    ]
    explicit = config.get("resume")
    if explicit and sweep:
        raise UserError(
            "resume goes on with one run; start a sweep "
            "again with its hydra.sweep.dir, and it goes on."
        )
    if explicit and _main_process() and Path(explicit).resolve() != directory.resolve():
        run_directory.copy(Path(explicit), directory)
    if (sweep or explicit) and _finished(directory, overrides):
        log.info("skipped, finished before: %s", directory)
        return overrides, None
    if explicit or _goes_on(config, directory, overrides):
        config = _as_before(config, directory, words if explicit else ())
        log.info("going on with the run in %s", directory)
    elif _main_process():
        run_directory.forget(directory)
    if _main_process():
        run_directory.begin(directory, overrides)
    return overrides, config


def _in_its_directory(words: list[str]) -> list[str]:
    """`resume=<run>` as the settings that the run was started with, then the other words, in the
    run's directory.

    Raises:
        UserError: no run was started there.
    """
    run = _resumed(words)
    if run is None:
        return words
    before = run_directory.settings_of(run)
    if before is None:
        why = f"holds no {STARTED}" if run.is_dir() else "does not exist"
        raise UserError(f"resume={run} {why}: give the directory of a run that was interrupted.")
    before = [in_full(word) for word in before]
    new = [word for word in words if option_of(word) != "resume" and word not in before]
    place = (
        []
        if any(option_of(word) == "hydra.run.dir" for word in words)
        else [option("hydra.run.dir", str(run))]
    )
    return [*before, *new, option("resume", str(run)), *place]


def _resumed(words: Sequence[str]) -> Path | None:
    """The directory that the last `resume=` names, if one does."""
    for word in reversed(words):
        if option_of(word) == "resume":
            try:
                value = value_of(word)
            except HydraException:
                return None  # Hydra, which reads it next, says what is wrong with it
            return None if value in (None, "") else Path(str(value))
    return None


def _go_on(config: DictConfig, directory: Path) -> str:
    """The command that goes on with an interrupted run."""
    line = command("train" if "stage" in config else "eval", option("resume", str(directory)))
    return f"`{line}`"


def _goes_on(config: DictConfig, directory: Path, overrides: list[str]) -> bool:
    """Whether the directory holds an interrupted run of the same settings.

    Raises:
        UserError: the settings are others.
    """
    if not run_directory.interrupted(directory):
        return False
    before = run_directory.settings_of(directory)
    if before == overrides:
        return True
    raise UserError(
        f"{directory} holds an interrupted run with other settings ({' '.join(before or ())}): "
        f"go on with it by {_go_on(config, directory)}, delete it, or choose another folder."
    )


def _as_before(config: DictConfig, directory: Path, words: Sequence[str]) -> DictConfig:
    """The config that a run was started with, and what `words` set anew: defaults may have changed
    meanwhile."""
    path = directory / run_directory.SETTINGS
    new = {
        option_of(word) for word in words if "=" in word and not option_of(word).startswith("hydra")
    } - {"resume"}
    if path.is_file() and not new & {"experiment", "debug"}:  # these set keys that they do not name
        remedy = "copy it again, or move it away to compose the settings of its command line anew"
        now, config = config, in_two_blocks(run_directory.read_yaml(path, remedy))
        for key in new:
            OmegaConf.update(config, key, OmegaConf.select(now, key), merge=False, force_add=True)
    OmegaConf.update(config, "resume", str(directory), force_add=True)
    return config


def chosen(key: str) -> bool:
    """Whether the command line of this job sets `key` (a group or a value) or something below
    it."""
    names = [option_of(text) for text in HydraConfig.get().overrides.task]
    return any(name == key or name.startswith((f"{key}.", f"{key}/")) for name in names)


def run_names(directory: Path) -> tuple[str, str | None]:
    """What a tracker may call this job, and the sweep that it belongs to, if any. A job of a sweep
    is called by what tells it from the others."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return directory.name, None
    sweep = Path(settings.sweep.dir)
    planned = sweep / "multirun.yaml"
    overrides = (
        run_directory.read_yaml(planned, "copy it again").hydra.overrides.task
        if planned.is_file()
        else []
    )
    parsed = OverridesParser.create().parse_overrides([str(word) for word in overrides])
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    words = [
        word for word in settings.overrides.task if word.lstrip("+").partition("=")[0] in swept
    ]
    return ",".join(map(in_short, words))[:LONGEST_NAME] or directory.name, sweep.name


def command_line() -> str:
    """The shell command of this job (of a sweep, the one that runs it alone); empty where Hydra did
    not start it."""
    if not HydraConfig.initialized():
        return ""
    settings = HydraConfig.get()
    words = [
        *(word for word in settings.overrides.task if option_of(word) != "resume"),
        *(text for text in settings.overrides.hydra if text.startswith("hydra.run.")),
    ]
    return command(settings.job.name, *map(in_short, words))


def _finished(directory: Path, overrides: list[str]) -> bool:
    before = run_directory.settings_of(directory, DONE)
    if before not in (None, overrides):
        raise UserError(
            f"{directory} holds a finished job with other settings "
            f"({' '.join(before or ())}); choose another folder with "
            "hydra.sweep.dir=<folder>, or train on from it with stage.init_from."
        )
    return before is not None


def _failed(directory: Path, error: Exception, sweep: bool) -> None:
    """Say so at once: Hydra reports an error of a sweep only after its last job."""
    if sweep:
        log.error("FAILED %s: %s", directory, error)
    if _main_process():
        # the error may be that nothing can be written; it is raised in any case
        with suppress(OSError):
            write_atomically(directory / FAILED, "".join(traceback.format_exception(error)))


def _stop(name: str, stop: Stopped) -> NoReturn:
    """One line about a signal, and the exit status that shells give it."""
    if not _main_process():
        # otherwise Lightning's launcher takes it for a crash, and kills the main process while it
        # saves
        sys.exit(0)
    what, again = (
        stop.saved or "nothing of the present step was kept",
        "start the same command again",
    )
    if HydraConfig.initialized():
        settings = HydraConfig.get()
        again = f"go on with `{command(name, option('resume', settings.runtime.output_dir))}`"
        if settings.mode == RunMode.MULTIRUN:
            where = quoted(option("hydra.sweep.dir", settings.sweep.dir))
            again = f"start the sweep again with {where}: what is finished is skipped"
    print(f"\nstopped by {signal.Signals(stop.number).name}: {what}; {again}", file=sys.stderr)
    sys.exit(128 + stop.number)


def _finish_wandb(status: int) -> None:
    """Close the run, if there is one: the next job of a sweep would go on with it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        try:
            wandb.finish(exit_code=status)
        except Exception as error:  # the work is done; what W&B did not get is still on disk
            where = quoted(str(Path(wandb.run.dir).parent))
            log.warning("W&B failed at the end (%s); upload with: wandb sync %s", error, where)


def _refuse_ddp(config: DictConfig) -> None:
    # Lightning starts its other ranks with the whole sweep as command line, and they would sweep
    # too, elsewhere.
    if str(OmegaConf.select(config, "trainer.strategy", default="")) == "ddp":
        raise UserError(
            "a sweep cannot run trainer.strategy=ddp in one process "
            "tree; start one command per job (docs/scaling.md)."
        )


def _main_process() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def option_of(text: str) -> str:
    """The key or group of an override."""
    return text.partition("=")[0].lstrip("+~").partition("@")[0]


def _exit(sentence: str) -> NoReturn:
    if _main_process():
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
