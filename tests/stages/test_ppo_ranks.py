"""Two processes under DDP."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.stages.toy_runs import policy, same, weights

RANKS = """
import sys, torch
import lightning.pytorch as pl
from tests.stages.toy_runs import LastWeights, fit, policy, ppo

class Report(LastWeights):
    epochs = []
    def on_train_batch_end(self, trainer, module, *rest):
        self.epochs.append(float(trainer.callback_metrics["ppo/update_epochs"]))
    def on_train_end(self, trainer, module):
        super().on_train_end(trainer, module)
        module.iteration = 0
        uids = [sample.uid for sample in next(iter(module.train_dataloader())).samples]
        found = {"weights": self.weights, "epochs": self.epochs, "uids": uids}
        torch.save(found, f"{sys.argv[1]}/{trainer.global_rank}.pt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {"advantage": sys.argv[2], "group": 4 if sys.argv[2] == "grpo" else 1}
    options |= {"iterations": 6, "update_epochs": 6, "kl_stop": float(sys.argv[3])}
    stage = ppo(policy(code_width=8, hidden=16), **options)
    fit(stage, Report(), strategy="ddp_fork", devices=2)
"""


SPOILED = """
import sys
from pathlib import Path
from tests.stages.toy_runs import fit, ppo
from tprl.runtime import distributed
from tprl.errors import UserError
from tprl.rewards import WeightedReward
from tprl.rewards.score_change import ScoreChange
from tprl.stages.ppo import PPO

def note(name, text):
    Path(sys.argv[1], f"{name}.txt").write_text(text)

class Spoiled(WeightedReward):
    def __call__(self, outcome):
        terms = super().__call__(outcome)
        if distributed.rank() == 1:
            next(iter(terms.values()))[0, 2] = float("nan")
            note("uid", outcome.uids[2])
        return terms

class Telling(PPO):
    def training_step(self, *given):
        try:
            super().training_step(*given)
        except UserError as error:
            note(distributed.rank(), str(error))
            raise

if __name__ == "__main__":
    fit(ppo(kind=Telling, reward=Spoiled([ScoreChange()])), strategy="ddp_fork", devices=2)
"""


def on_two_ranks(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    root, script = Path(__file__).parents[2], folder / "ranks.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'src')!r}]\n{code}")
    command = [sys.executable, str(script), str(folder), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


class TestRanks:
    @pytest.mark.slow
    @pytest.mark.parametrize("advantage", ["gae", "grpo"])
    def test_two_ranks_stop_alike_and_end_with_the_same_weights(
        self, advantage: str, tmp_path: Path
    ) -> None:
        done = on_two_ranks(tmp_path, RANKS, advantage, "0.02")
        assert done.returncode == 0, done.stderr[-2000:]
        item, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert same(item["weights"], two["weights"])
        assert not same(item["weights"], weights(policy(code_width=8, hidden=16)))  # they moved
        assert item["epochs"] == two["epochs"]
        assert len(set(item["epochs"])) > 1  # some iterations stopped early, some did not
        assert not set(item["uids"]) & set(two["uids"])

    @pytest.mark.slow  # test_finite shows the same on one rank
    def test_what_is_not_finite_on_one_rank_stops_both_with_its_sample(
        self, tmp_path: Path
    ) -> None:
        done = on_two_ranks(tmp_path, SPOILED)
        assert done.returncode != 0
        first, second, uid = ((tmp_path / f"{name}.txt").read_text() for name in (0, 1, "uid"))
        assert first == second
        assert first.startswith(
            f"iteration 0: reward/score_change is not a number for sample {uid};"
        )
