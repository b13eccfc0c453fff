"""Two processes under DDP."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.stages.toy_runs import same

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
        uids = [sample.uid for sample in next(iter(module.train_dataloader()))]
        found = {"weights": self.weights, "epochs": self.epochs, "uids": uids}
        torch.save(found, f"{sys.argv[1]}/{trainer.global_rank}.pt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {"advantage": sys.argv[2], "group": 4 if sys.argv[2] == "grpo" else 1}
    stage = ppo(policy(code_width=8, hidden=16), iterations=6, update_epochs=6, kl_stop=float(sys.argv[3]), **options)
    fit(stage, Report(), strategy="ddp_fork", devices=2)
"""


class TestRanks:
    @pytest.mark.parametrize("advantage", ["gae", pytest.param("grpo", marks=pytest.mark.slow)])
    def test_two_ranks_stop_alike_and_end_with_the_same_weights(self, advantage: str, tmp_path: Path) -> None:
        root = Path(__file__).parents[2]
        script = tmp_path / "ranks.py"
        script.write_text(f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'src')!r}]\n{RANKS}")
        command = [sys.executable, str(script), str(tmp_path), advantage, "0.02"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert same(one["weights"], two["weights"])
        assert one["epochs"] == two["epochs"]
        assert len(set(one["epochs"])) > 1  # some iterations stopped early, some did not
        assert not set(one["uids"]) & set(two["uids"])
