"""`stage=alternate`: PPO and LoRA in turn, each on what the other has made."""

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.commands.calls import call
from tests.commands.configs import config, sentence_of
from tests.helpers import untrained_policy

from tprl import Pruner, prune
from tprl.build import build
from tprl.commands.plan import check_plan
from tprl.commands.setup import plain
from tprl.commands.train import Training, train
from tprl.commands.unread import check_read
from tprl.lvlm.adapters import read_adapter
from tprl.pruners.learned import load_pruner
from tprl.runtime.curves import read_curves
from tprl.stages.ppo import PPO
from tprl.stages.tune import Tune

SMALL = (
    *("stage=alternate", "debug=fast", "logger=csv", "model=llava", "model.pretrained=null"),
    *("policy.code_width=8", "policy.hidden=16", "policy.width=16", "policy.layers=1"),
    *("policy.heads=2", "policy.select=topk", "stage.tune.iterations=2", "stage.tune.prompts=2"),
    *("stage.tune.lr=0.05", "stage.tune.save_every=1", "stage.ppo.served.limit=2"),
    *("stage.tune.served.limit=2", "stage.ppo.prompts=2", "stage.evaluation.limit=2"),
    *("stage.ppo.iterations=2", "stage.ppo.save_every=1"),
    *("stage.evaluation.keep_ratios=[0.1111]", "stage.ppo.calibrate=null", "cache=null"),
)
ALL = ("ppo_1", "tune_1", "ppo_2", "tune_2")


class Diary:
    """The weights after every part of a run: of the pruner and, where one is worn, the adapter."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pruner: dict[str, Any] = {}
        self.adapter: dict[str, str | None] = {}
        note: Callable[..., None] = Training.note
        # The last weights count source, whatever they score: a random model answers nothing.
        patch.setattr(
            PPO,
            "keep_if_best",
            lambda stage, score: setattr(
                stage, "best_state", copy.deepcopy(stage.pruner.state_dict())
            ),
        )

        def noted(run: Training, part: str) -> None:
            note(run, part)
            self.pruner[part] = copy.deepcopy(run.pruner.state_dict())
            worn = run.worn.adapter
            self.adapter[part] = None if worn is None else worn.print

        patch.setattr(Training, "note", noted)

    def same(self, part: str, other: str) -> bool:
        """Whether the pruner is the same after both parts."""
        weights = self.pruner[part]
        return all(torch.equal(weights[name], value) for name, value in self.pruner[other].items())


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "pruner"
    untrained_policy(48).save_pretrained(folder)
    return folder


class Stops:
    """The power goes in the second round, before the second iteration of a kind of stage."""

    def __init__(self, kind: type[Any], diary: Diary, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        step = kind.training_step

        def stopping(stage: Any, batch: Any, index: int) -> Any:
            if "tune_1" in diary.pruner and stage.iteration == 1:
                self.count += 1
                raise RuntimeError("the power is gone")
            return step(stage, batch, index)

        patch.setattr(kind, "training_step", stopping)


def check_whole(run: Path, diary: Diary) -> None:
    """What two rounds leave in a run."""
    # Each stage moves what it trains, and nothing else.
    assert tuple(diary.pruner) == ALL
    assert diary.same("ppo_1", "tune_1")
    assert diary.same("ppo_2", "tune_2")
    assert not diary.same("tune_1", "ppo_2")
    assert diary.adapter["ppo_1"] is None
    assert diary.adapter["tune_1"] == diary.adapter["ppo_2"] != diary.adapter["tune_2"]
    # The last of both lie in the run, side by side, and those of each round below it.
    for place, part in (
        (run, "tune_2"),
        (run / "rounds/1", "tune_1"),
        (run / "rounds/2", "tune_2"),
    ):
        adapter = read_adapter(place)
        assert adapter.print == diary.adapter[part]
        assert adapter.about["iterations"] == 2 * int(part[-1])
        weights = load_pruner(run / place).state_dict()
        assert all(torch.allclose(weights[n], v) for n, v in diary.pruner[part].items())
    stages = load_pruner(run).trained_on["stages"]
    assert stages == ["ppo", "tune", "ppo", "tune"]
    titles = read_curves(run)
    for number in (1, 2):
        assert f"ppo, return of an episode: round {number}" in titles
        assert f"tune, accuracy: served, round {number}" in titles
    # Equal names in every round, so that a column says which.
    with (run / "metrics.csv").open() as file:
        rounds = [float(row["round"]) for row in csv.DictReader(file) if row["round"]]
    assert rounds == sorted(rounds)
    assert set(rounds) == {1, 2}
    assert (run / "results.csv").is_file()


@pytest.mark.slow
def test_two_rounds_and_those_that_were_stopped_in_the_second(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = Diary(monkeypatch)
    words = (*SMALL, f"stage.init_from={start}")
    run = call("train", train, tmp_path / "whole", *words)
    check_whole(run, diary)

    # As the documents say: both by the run's name, on the model before any of it.
    lvlm = build(OmegaConf.load(run / "config.yaml").model)
    pruner, options = Pruner.from_pretrained(run), {"keep_ratio": 1 / 9, "adapter": run}
    with prune(lvlm.model, pruner, **options, processor=lvlm.processor) as pruning:
        assert pruning.pruner is pruner

    # Stopped in the second round, in either stage, and gone on with: the same run.
    for kind, missing in ((PPO, ("ppo_2", "tune_2")), (Tune, ("tune_2",))):
        again = tmp_path / f"stopped_{kind.__name__}"
        diary.pruner.clear()
        with monkeypatch.context() as patch:
            stops = Stops(kind, diary, patch)
            with pytest.raises((RuntimeError, SystemExit)):
                call("train", train, again, *words)
        assert stops.count == 1
        diary.pruner.clear()
        call("train", train, again, f"resume={again}")
        assert tuple(diary.pruner) == missing
        assert read_adapter(again).print == read_adapter(run).print
        assert read_curves(again) == read_curves(run)
        first, second = (load_pruner(folder).state_dict() for folder in (run, again))
        assert all(torch.equal(first[name], value) for name, value in second.items())


def refusal(start: Path | None, *words: str, **values: Any) -> str:
    options = {} if start is None else {"stage__init_from": str(start)}
    composition = config("train", *(words or ("stage=alternate",)), **options, **values)
    return sentence_of(check_plan, plain(composition))


def test_what_does_not_go_together_is_refused(start: Path) -> None:
    pytest.importorskip("peft")
    assert refusal(None) == (
        "stage=alternate needs a trained policy: give stage.init_from=<run directory>."
    )
    assert "trains no policy: add ppo" in refusal(start, stage__chain=["tune"])
    assert refusal(start, stage__baselines=["mlp"]) == (
        "stage.rounds=2 repeats a chain, and stage.baselines=[mlp] are taught once: set "
        "stage.baselines=[]."
    )
    assert "leave model.adapter out, and give stage.init_from=runs/x" in refusal(
        start, model__adapter="runs/x"
    )
    assert "toy has none: use model=tiny_llava" in refusal(
        start, model___target_="tprl.lvlm.toy.ToyLVLM", model__name="toy"
    )
    # A folder with a pruner alone is no tuned run.
    assert "holds no adapter" in refusal(start, "stage=tune")


def test_a_selector_in_a_chain_is_the_policy() -> None:
    words = ("stage=alternate", "pruner=tprl")
    sentence = sentence_of(check_read, "train", config("train", *words), ["pruner"])
    assert sentence.startswith("pruner is not read: stage=alternate reads ")
