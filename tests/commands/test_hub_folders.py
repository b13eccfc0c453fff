"""A checkpoint as the hub lays it out, from loading to an evaluation; of every family, with small
random weights: with published settings and template where those are at hand, else as transformers
saves it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands.calls import call
from tests.lvlm.real import CHECKPOINTS, real, shrunk
from tests.lvlm.small import families, save_folder

import tprl
from tprl.bench.parity import parity
from tprl.build import load_component
from tprl.commands.check import check_run
from tprl.commands.evaluate import evaluate
from tprl.commands.train import train
from tprl.data.scenes import Scenes

pytestmark = pytest.mark.slow
# four images, of which InternVL3 and SmolVLM2 make a tile each
TILES = ("internvl3", "smolvlm2")
# They refuse the default demonstrator, which reads layers of the language model.
UNREAD = ("gemma3", "gemma4", "qwen3_5")
SHORT = ("calibrate=null", "served.limit=2")  # of each stage
PUBLISHED = [pytest.param(item, marks=real, id=item[0]) for item in CHECKPOINTS.items()]
SAVED = [name for name in families() if name not in CHECKPOINTS.values()]


@pytest.fixture(scope="module", params=[*PUBLISHED, *SAVED])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(how the model is called, its folder, the options that name it)."""
    if isinstance(request.param, str):
        name, folder = request.param, tmp_path_factory.mktemp(request.param)
        save_folder(load_component("model", name, pretrained=None, dtype="float32"), folder)
    else:
        checkpoint, name = request.param
        folder = shrunk(checkpoint, tmp_path_factory.mktemp("hub") / checkpoint)
    options = [f"model={name}", f"model.pretrained={folder}", "model.dtype=float32"]
    options += ["model.max_new_tokens=2", "model.micro_batch=4"]
    if name in TILES:
        options.append("model.max_tiles=1")
    return name, folder, options


def test_it_loads_and_equals_the_stock_class(place: Any) -> None:
    name, folder, _ = place
    bound = {"max_tiles": 1} if name in TILES else {}
    lvlm = load_component(
        "model", name, pretrained=str(folder), dtype="float32", max_new_tokens=2, **bound
    )
    gaps = parity(lvlm, [Scenes("val")[0], Scenes("val")[5]], steps=2)
    assert gaps.same_ids
    assert max(gaps.keep_all, gaps.pruned) < 1e-4


def test_it_is_checked(place: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, options = place
    assert check_run([*options, "trainer=cpu", "stage=ppo"]) == 0
    assert "as many placeholders as features" in capsys.readouterr().out


def test_the_stock_model_generates_pruned_from_its_own_template(place: Any) -> None:
    name, folder, _ = place
    lvlm = load_component("model", name, pretrained=str(folder), dtype="float32")
    sample = Scenes("val")[0]
    inputs = lvlm.processor(
        text=[lvlm.render(sample)], images=[list(sample.images)], return_tensors="pt"
    )
    whole = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with tprl.prune(lvlm.model, "divprune", keep_ratio=1.0, processor=lvlm.processor):
        same = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with tprl.prune(lvlm.model, "divprune", keep_ratio=0.2, processor=lvlm.processor):
        pruned = lvlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(same, whole)
    assert pruned.shape[1] > inputs["input_ids"].shape[1]


def test_it_is_trained_in_two_steps_and_evaluated(place: Any, tmp_path: Path) -> None:
    """By one command: the chain of a single `stage=all`, which ends with a table."""
    name, _, options = place
    words = ["stage=all", "stage.chain=[lfd,ppo]", "stage.baselines=[]", *options]
    words += ["trainer=cpu", "logger=none", "cache=null"]
    words += ["policy.code_width=0", "policy.width=16", "policy.heads=2", "policy.layers=1"]
    words += [f"stage.{stage}.{word}" for stage in ("lfd", "ppo") for word in SHORT]
    words += ["stage.lfd.demonstrations=4", "stage.lfd.epochs=1"]
    words += ["pruner=attention_dpp"] if name in UNREAD else []
    words += ["stage.ppo.iterations=1", "stage.ppo.prompts=2", "stage.ppo.group=2"]
    words += ["stage.ppo.keep_ratio=0.3", "stage.ppo.minibatch=4"]
    words += ["stage.evaluation.pruners=[random]", "stage.evaluation.keep_ratios=[0.3]"]
    run = call("train", train, tmp_path, *words, "stage.evaluation.limit=2")
    (table,) = run.rglob("results.csv")
    assert {"tprl", "random"} <= set(table.read_text().replace(",", " ").split())
    asked = [f"run={run}", "pruners=[uniform]", "keep_ratios=[0.3]", "limit=2", "logger=none"]
    table = call("eval", evaluate, tmp_path / "again", *asked) / "results.csv"
    assert {"tprl", "uniform"} <= set(table.read_text().replace(",", " ").split())
