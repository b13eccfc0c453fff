"""Checkpoints come at the end of every n-th batch, not one later, and a run goes on from them as if
never stopped."""

import contextlib
import csv
import os
import random
import signal
from errno import ENOSPC
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tests.stages.test_lfd import lfd
from tests.stages.toy_runs import LastWeights, fit, policy, ppo, same, weights

from tprl.runtime import files, signals
from tprl.runtime.checkpoint import LAST, SaveEvery, checkpoint_of, draw_from, draws
from tprl.runtime.metrics_csv import MetricsCSV


class Diary(pl.Callback):
    """The iteration of the newest checkpoint, seen after every batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[int] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        there = self.path.is_file()
        self.seen.append(
            torch.load(self.path, weights_only=True)["ppo"]["iteration"] if there else 0
        )


def test_every_second_iteration(tmp_path: Path) -> None:
    diary = Diary(tmp_path / LAST)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SaveEvery(tmp_path, 2), diary],
    )  # fmt: skip
    trainer.fit(ppo(iterations=5))
    assert diary.seen == [0, 2, 2, 4, 5]  # and the last one


class Signal(pl.Callback):
    """Asks the run to stop in the middle of a batch."""

    def __init__(self, batch: int, number: int = signal.SIGTERM) -> None:
        self.batch, self.number = batch, number

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if (
            trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch
            and signals.asked() is None
        ):
            os.kill(os.getpid(), self.number)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_iteration_is_finished_and_saved(self, number: int, tmp_path: Path) -> None:
        with (
            signals.listening(),
            pytest.raises(signals.Stopped, match=signal.Signals(number).name) as stop,
        ):
            fit(ppo(iterations=6), SaveEvery(tmp_path, 5), Signal(2, number))
        assert stop.value.saved == "iteration 2 is finished and saved"
        assert torch.load(tmp_path / LAST, weights_only=True)["ppo"]["iteration"] == 2

    def test_a_stage_without_checkpoints_stops_at_once(self, tmp_path: Path) -> None:
        with signals.listening(), pytest.raises(signals.Stopped) as stop:
            fit(ppo(iterations=6), SaveEvery(tmp_path, None), Signal(2))
        assert stop.value.saved == ""
        assert not (tmp_path / LAST).exists()

    def test_a_failure_does_not_make_later_signals_wait(self, tmp_path: Path) -> None:
        class Broken(pl.Callback):
            def on_train_batch_start(self, *_: Any, **__: Any) -> None:
                raise ZeroDivisionError

        with signals.listening():
            with pytest.raises(ZeroDivisionError):
                fit(ppo(), SaveEvery(tmp_path, 1), Broken())
            with pytest.raises(signals.Stopped):
                os.kill(os.getpid(), signal.SIGTERM)


class TestGoingOn:
    @pytest.mark.parametrize("batch", [1, 3, 4, 5, 8])
    def test_lfd_from_any_step(self, batch: int, tmp_path: Path) -> None:
        """Two epochs of four batches, the last one of them short; 4 and 8 are the last steps of an
        epoch."""
        options: dict[str, Any] = {"demonstrations": 56, "batch_size": 16, "epochs": 2}
        whole, first, ends = lfd(**options), lfd(**options), (LastWeights(), LastWeights())
        torch.manual_seed(0)
        fit(whole, ends[0])
        drawn = torch.rand(())  # the weights of a policy that is taught next begin with it
        torch.manual_seed(0)
        with signals.listening(), pytest.raises(signals.Stopped):
            fit(first, SaveEvery(tmp_path, 100), Signal(batch))
        resumed = lfd(policy(7), **options)
        fit(resumed, SaveEvery(tmp_path, 100), ends[1], ckpt_path=tmp_path / LAST)
        assert torch.rand(()) == drawn
        assert same(ends[0].weights, ends[1].weights)
        assert (resumed.curve, resumed.best, resumed.samples_seen) == (whole.curve, whole.best, 112)
        assert same(weights(whole.pruner), weights(resumed.pruner))

    def test_random_numbers_and_the_table_of_metrics_go_on(self, tmp_path: Path) -> None:
        """A stage that draws from all generators, as none of ours does, between its steps."""

        class Draws(pl.Callback):
            def __init__(self, seed: int) -> None:
                self.seed = seed
                self.seen: list[float] = []

            def on_train_start(self, *_: Any, **__: Any) -> None:
                pl.seed_everything(self.seed, verbose=False)

            def on_train_batch_start(self, *_: Any, **__: Any) -> None:
                # libraries draw from random, too
                self.seen.append(float(torch.rand(())) + np.random.random())

        def run(name: str, seed: int, *more: pl.Callback, **options: Any) -> list[float]:
            draws, logger = Draws(seed), MetricsCSV(tmp_path / name, name="", version="")
            with contextlib.suppress(signals.Stopped), signals.listening():
                callbacks = [SaveEvery(tmp_path, 100), *more, draws]
                trainer = pl.Trainer(
                    max_epochs=1, accelerator="cpu", logger=logger, callbacks=callbacks,
                    log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
                    enable_model_summary=False,
                )  # fmt: skip
                trainer.fit(ppo(iterations=5, validate_every=2), weights_only=True, **options)
            return draws.seen

        def table(name: str) -> list[dict[str, str]]:
            """The rows without what a clock has measured."""
            with (tmp_path / name / "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
            return [
                {k: v for k, v in r.items() if not k.startswith("time/") and "per_second" not in k}
                for r in rows
            ]

        whole, first = run("whole", 0), run("parts", 0, Signal(3))
        # iterations after the checkpoint, cut by a kill
        (tmp_path / "parts/metrics.csv").open("a").write("9,9\n")
        assert first + run("parts", 1, ckpt_path=tmp_path / LAST) == whole
        assert table("parts") == table("whole")

    def test_all_generators_are_put_back(self) -> None:
        def drawn() -> tuple[float, float, float]:
            return float(torch.rand(())), random.random(), np.random.normal()

        np.random.normal()  # leaves a second number in store
        states = draws()
        first = drawn()
        drawn()
        draw_from(states)
        assert drawn() == first

    def test_a_checkpoint_belongs_to_its_part(self, tmp_path: Path) -> None:
        fit(ppo(), SaveEvery(tmp_path, 1, "ppo"))
        assert checkpoint_of(tmp_path, "ppo") == str(tmp_path / LAST)
        assert checkpoint_of(tmp_path, "lfd") is None
        assert checkpoint_of(tmp_path / "nowhere", "ppo") is None

    def test_a_write_that_fails_leaves_the_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that is full from the second checkpoint on."""
        writes: list[Path] = []
        sync = files._sync

        def full(path: Path) -> None:
            if path.name.startswith(LAST) and path.parent == tmp_path:  # not its checksum
                writes.append(path)
                if len(writes) > 1:
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
            sync(path)

        monkeypatch.setattr(files, "_sync", full)
        with pytest.raises(OSError, match="No space left") as error:
            fit(ppo(iterations=4), SaveEvery(tmp_path, 1))
        assert error.value.filename == str(tmp_path / LAST)
        assert torch.load(tmp_path / LAST, weights_only=True)["ppo"]["iteration"] == 1
        assert sorted(os.listdir(tmp_path)) == [files.SUMS, LAST]
        files.check(tmp_path / LAST)
