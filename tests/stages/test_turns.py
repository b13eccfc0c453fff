"""Stage `turns`: what it refuses, what it rewards, and a run of one iteration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.commands.calls import call, refused

from tprl.build import conf_dir
from tprl.commands.stages import in_one_table
from tprl.commands.train import train
from tprl.data.scenes import Scenes
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.evaluation.entries import trained_entries
from tprl.pruners.core_focus import CoreFocus
from tprl.rl.rollout import Rollout
from tprl.stages.turns import ImageStream, Turns


class Lonely(ToyDataset):
    """One that does not say how its questions follow each other."""

    questions_per_image = 1


DPP = {"policy": {"select": "dpp"}}


def settings(**changes: Any) -> dict[str, Any]:
    """Those of the yaml, with changes."""
    node: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "stage/turns.yaml"))
    return in_one_table("stage", node) | changes


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"budget": "free"}, "stage.budget must be exact_k where a core is shared, got free"),
            ({"steps": 3}, "stage.steps must be 1 where a core is shared, got 3"),
            ({"credit_blocks": 4}, "stage.credit_blocks must be 0"),
            ({"prompts": 10}, "stage.prompts=10 are not whole images of stage.questions=4"),
            ({"group": 1}, "compares episodes of one question: set stage.group above 1"),
        ],
    )
    def test_settings_of_another_algorithm(self, changes: dict[str, Any], message: str) -> None:
        Turns.check("stage", settings(), DPP)
        with pytest.raises(UserError, match=message):
            Turns.check("stage", settings(**changes), DPP)

    def test_a_policy_that_no_dpp_serves(self) -> None:
        with pytest.raises(UserError, match=r"use policy\.select=dpp, got topk"):
            Turns.check("stage", settings(), {"policy": {"select": "topk"}})

    def test_more_turns_than_there_are_questions_about_an_image(self) -> None:
        with pytest.raises(UserError, match=r"use stage.questions=5 or dataset.rounds above it"):
            ImageStream(Scenes("train"), 8, 16, 0, 1)
        with pytest.raises(UserError, match="use dataset=scenes or dataset=crowd"):
            ImageStream(Lonely("train"), 2, 4, 0, 1)


def test_images_come_with_several_questions_each_and_go_on_after_a_break() -> None:
    dataset = Scenes("train", rounds=2)
    batches = list(ImageStream(dataset, 4, 8, 0, 3, seed=1))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    for batch in batches:
        for start in (0, 4):
            part = batch[start : start + 4]
            assert len({sample.uid.rpartition("/")[0] for sample in part}) == 1
            assert len({sample.uid for sample in part}) == 4
    resumed = list(ImageStream(dataset, 4, 8, 2, 3, seed=1))
    assert [s.uid for s in resumed[0]] == [s.uid for s in batches[2]]


def test_the_core_answers_for_the_mean_over_questions_and_the_focus_for_its_own() -> None:
    """Two images, two questions, two episodes: by hand."""
    stage: Any = Turns.__new__(Turns)
    torch.nn.Module.__init__(stage)
    stage._hparams = {"group": 2, "questions": 2}
    core = torch.tensor([True, False]).expand(1, 8, 2)
    stage.core = core
    # Rewards [image, question, episode].
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0]])
    draws = core.long(), torch.zeros(1, 8, 2), reward
    advantage, target = Turns._advantage(stage, reward, Rollout(core, *draws))
    assert target is None
    of_core, of_focus = advantage[0, :, 0], advantage[0, :, 1]
    # Means over questions: image 0 (0.5, 0.5), image 1 (2, 1); less the other episode's.
    mean = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0])
    own = torch.tensor([1.0, -1.0, -1.0, 1.0, 2.0, -2.0, 0.0, 0.0])
    scale = of_core[4] / mean[4]
    torch.testing.assert_close(of_core, scale * mean)
    torch.testing.assert_close(of_focus, of_focus[0] * own)


class TestRun:
    """On the toy world, six questions about a picture."""

    TOY = ("model=toy", "dataset=toy", "logger=csv", "cache=null", "policy.code_width=0")
    SMALL = ("stage.iterations=1", "stage.prompts=4", "stage.group=2", "stage.minibatch=4")
    SMALL += ("stage.served.limit=4", "stage.served.keep_ratios=[0.25]", "stage.keep_ratio=0.25")

    def test_what_is_trained_is_served_as_core_and_focus(self, tmp_path: Path) -> None:
        words = ("stage=turns", *self.TOY, *self.SMALL, "stage.questions=2", "stage.share=0.25")
        run = call("train", train, tmp_path / "run", *words, "stage.core_first=false")
        about = json.loads((run / "pruner" / "config.json").read_text())["trained_on"]
        assert about["core"] == {"share": 0.25, "core_first": False}
        assert about["stages"][-1] == "turns"
        entries = {e.name: e.pruner for e in trained_entries(run, {"keep_ratios": [0.1]})}
        shared = entries["tprl_core_focus"]
        assert isinstance(shared, CoreFocus)
        assert (shared.core_share, shared.core_first) == (0.25, False)

    @pytest.mark.slow
    def test_a_stage_that_trains_the_logits_anew_shares_no_core(self, tmp_path: Path) -> None:
        words = ("stage=turns", *self.TOY, *self.SMALL, "stage.questions=2")
        run = call("train", train, tmp_path / "run", *words)
        more = ("stage=ppo", *self.TOY, *self.SMALL, "stage.calibrate=null")
        after = call("train", train, tmp_path / "after", *more, f"stage.init_from={run}")
        later = json.loads((after / "pruner" / "config.json").read_text())
        assert "core" not in later["trained_on"]

    def test_more_turns_than_questions_is_one_sentence(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("stage=turns", *self.TOY, *self.SMALL, "stage.questions=8", "stage.prompts=8")
        line = refused(capsys, "train", tmp_path / "run", *words)
        assert "stage.questions=8 asks more questions about an image than the 6" in line
