"""Weights & Biases: an axis for every metric, what a run was made from, and no failure that stops a
run."""

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from tprl.runtime.checkpoint import LAST
from tprl.runtime.quoting import quoted

log = logging.getLogger(__name__)
SEEN, RATIO = "samples_seen", "keep_ratio"  # the x axes: of training, and of evaluations
ENVIRONMENT = {"group": "WANDB_RUN_GROUP", "name": "WANDB_NAME", "job_type": "WANDB_JOB_TYPE"}
AXES = frozenset({SEEN, RATIO, "trainer/global_step", "epoch"})


class Tracker(WandbLogger):
    """A W&B logger that gives every metric its x axis, and goes on offline where W&B fails.

    A metric is defined by its exact name when it is first logged: names are known no earlier, and
    among definitions with wildcards, Lightning's own included, the winner is random. Without a key
    the run is offline from the start; WANDB_MODE, where set, decides instead.

    Args:
        save_dir: W&B's files go to `<save_dir>/wandb`.
        project: in W&B.
        overlay_every: PPO iterations between pictures of what is kept (see `report.overlays`); 0
            draws none.
        overlays: pictures each time; 0 draws none.
        artifacts: whether the weights are uploaded at the end.
        init_timeout: seconds to wait for W&B at the start before the run goes on offline.
        finish_timeout: seconds to wait for uploads at the end; what is left can be uploaded with
            `wandb sync`.
        options: further arguments of `wandb.init`, e.g. entity, tags, group.
    """

    def __init__(
        self,
        save_dir: str | Path,
        project: str = "tprl",
        overlay_every: int = 25,
        overlays: int = 4,
        artifacts: bool = False,
        init_timeout: float = 20.0,
        finish_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        import wandb  # late, for runs that log elsewhere

        limits = wandb.Settings(
            init_timeout=init_timeout, login_timeout=init_timeout, finish_timeout=finish_timeout
        )
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        # W&B would otherwise go on with a run that is open in this process, e.g. of the job before
        # in a sweep.
        settled: dict[str, Any] = {
            "mode": mode,
            "settings": limits,
            "reinit": "finish_previous",
            "config": {},
        }
        super().__init__(save_dir=str(save_dir), project=project, **(settled | options))
        self._wandb_init.pop("anonymous")  # W&B warns of it, whatever its value
        self.overlay_every, self.overlays, self.artifacts = overlay_every, overlays, artifacts
        self._defined: set[str] = set()
        self._failed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started on first use; never raises."""
        if self._experiment is None:
            try:
                self._experiment = self._start()
            except Exception as error:
                self._fall_back(error)
        return self._experiment

    def _start(self) -> Any:
        import wandb

        return wandb.init(**self._wandb_init)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.log_row({**metrics} if step is None else {**metrics, "trainer/global_step": step})

    def log_row(self, row: Mapping[str, Any], axis: str = SEEN) -> None:
        """Log values that belong together, to be drawn over `axis`."""

        def act(run: Any) -> None:
            # A metric is defined before its first value, or W&B draws it over steps.
            for name in (axis, *row):
                if name not in self._defined:
                    run.define_metric(name, **({} if name in AXES else {"step_metric": axis}))
                    self._defined.add(name)
            run.log(dict(row))

        self.act(act)

    def describe(self, facts: Mapping[str, Any], **identity: str | None) -> None:
        """Add plain values to the run's config. `identity` (group, name, job_type) counts before
        the first use, where neither the yaml nor W&B's environment variables say otherwise."""
        for key, value in identity.items():
            if value and not self._wandb_init.get(key) and ENVIRONMENT[key] not in os.environ:
                self._wandb_init[key] = value
        self._wandb_init["config"] |= facts
        if self._experiment is not None:
            self.act(lambda run: run.config.update(dict(facts), allow_val_change=True))

    def log_hyperparams(self, params: Any) -> None:
        """Nothing: of several stages in one run Lightning would keep the last one's. See
        `describe`."""

    def act(self, todo: Callable[[Any], None]) -> None:
        """Do something with the run, and where W&B fails again with the run that takes its
        place."""
        while not isinstance(run := self.experiment, _DummyExperiment):
            try:
                return todo(run)
            except Exception as error:
                self._fall_back(error)
        return None

    def _fall_back(self, error: Exception) -> None:
        """Go on in an offline run, or in none if that fails too. One line says so, with the way
        back."""
        # Forgotten first: tearing down may fail in the same way.
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        broken: Any = self._experiment
        self._defined, self._experiment = set(), None
        paths = [] if broken is None else [str(Path(broken.dir).parent)]
        _tear_down()
        # Once offline, then not at all: no third attempt.
        if not self._failed:
            self._failed = True
            self._wandb_init |= {"mode": "offline", "resume": None}
            try:
                self._experiment = run = self._start()
            except Exception as again:
                why = f"{why}; offline {type(again).__name__}: {again}".splitlines()[0]
            else:
                paths.append(str(Path(run.dir).parent))
                log.warning(
                    "W&B failed (%s): offline from here; upload with: wandb sync %s",
                    why,
                    _listed(paths),
                )
                return
        self._experiment = _DummyExperiment()
        kept = f"; upload what was logged with: wandb sync {_listed(paths)}" if paths else ""
        log.warning("W&B failed (%s): nothing more is logged to it%s", why, kept)


def _listed(paths: Sequence[str]) -> str:
    """As bash reads them."""
    return " ".join(map(quoted, paths))


def log_weights(logger: object, directory: Path) -> None:
    """Upload the pruner and the last checkpoint of a run as an artifact, where the logger is W&B's
    and was told to."""
    if not isinstance(logger, Tracker) or not logger.artifacts:
        return
    import wandb

    def act(run: Any) -> None:
        artifact = wandb.Artifact(f"pruner-{run.id}", type="model")
        # The last checkpoint exists only while a run can still go on.
        artifact.add_dir(str(directory / "pruner"), name="pruner")
        if (directory / LAST).is_file():
            artifact.add_file(str(directory / LAST))
        run.log_artifact(artifact)

    logger.act(act)


def _tear_down() -> None:
    """Let go of a run that failed, and of the process behind it."""
    import wandb

    try:
        wandb.teardown(exit_code=1)
    except Exception as error:  # that is why we are here
        log.debug("W&B cannot be torn down: %s", error)


def has_key() -> bool:
    """Whether this machine has a W&B key, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
