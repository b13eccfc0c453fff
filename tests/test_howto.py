"""What docs/howto-*.md say works: their code is a benchmark, an LVLM, a pruner, a reward; their
rows are data."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.data.rows import as_text, encoded, official, picture, write_jsonl

from tprl.bench.parity import parity
from tprl.data.custom import Custom
from tprl.data.scenes import Scenes
from tprl.lvlm.llava import Llava
from tprl.pruners.learned import load_pruner
from tprl.rewards import WeightedReward
from tprl.types import Outcome, Pruner

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {"dataset": "counting", "lvlm": "vip_llava", "pruner": "loudest", "reward": "answers_lost"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (DOCS / f"howto-{page}.md").read_text(), re.DOTALL
    )


def block(page: str, language: str) -> str:
    """The first one."""
    return blocks(page, language)[0]


@pytest.fixture
def module(page: str, tmp_path: Path) -> Any:
    """The code of a page, in a file of its own."""
    path = tmp_path / f"{PAGES[page]}.py"
    path.write_text(block(page, "python"))
    spec = importlib.util.spec_from_file_location(PAGES[page], path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("page", PAGES)
def test_one_file_of_less_than_sixty_lines_and_a_yaml_that_names_it(page: str, module: Any) -> None:
    assert len((block(page, "python") + block(page, "yaml")).splitlines()) < 60
    config = yaml.safe_load(block(page, "yaml"))
    targets = [config["_target_"], *(term["_target_"] for term in config.get("terms", {}).values())]
    ours = [target for target in targets if PAGES[page] in target]
    assert len(ours) == 1
    assert hasattr(module, ours[0].rpartition(".")[2])


@pytest.mark.parametrize("page", ["dataset"])
def test_a_benchmark_with_its_own_score(module: Any, tmp_path: Path) -> None:
    rows = [
        {
            "image_id": 7,
            "image": as_text(encoded(7)),
            "question_id": n,
            "question": "How many?",
            "count": count,
        }
        for n, count in enumerate((3, 3, 3, 0))
    ]
    data = module.Counting(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert data[0].uid == "counting/test/7/0"
    assert data[3].question == "How many?\nAnswer with a number."
    predictions = ["3 dogs", "There are 4.", "three", "10"]
    assert official(data, predictions) == pytest.approx({"accuracy": 25, "within_one": 50})


def test_the_rows_are_data(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(block("dataset", "json"))
    (tmp_path / "photos").mkdir()
    picture(1, (400, 300)).save(tmp_path / "photos/1.png")
    data = Custom("all", source=str(tmp_path / "data.jsonl"), coordinates="absolute")
    assert (data[0].answers, data[1].box) == (("a cup", "cup"), (120.0, 40.0, 310.0, 260.0))


@pytest.mark.parametrize("page", ["lvlm"])
def test_an_lvlm_that_is_exact_and_has_a_cost(module: Any) -> None:
    lvlm = module.VipLlava(None)
    result = parity(lvlm, [Scenes("test")[i] for i in range(3)])
    assert result.keep_all == 0
    assert max(result.pruned, result.decode, result.batch) < 1e-5
    assert result.same_ids
    assert lvlm.shape.projector[0] == 2 * lvlm.model.config.vision_config.hidden_size


@pytest.mark.parametrize("page", ["pruner"])
def test_a_pruner_keeps_exactly_the_loudest(module: Any) -> None:
    pruner, result = (
        module.LoudestPruner(),
        Llava(None).encode([Scenes("test")[i] for i in range(2)]),
    )
    assert isinstance(pruner, Pruner)
    keep = pruner.select(result, 1 / 4).keep
    loud = result.visual.norm(dim=-1)
    assert keep.sum(1).tolist() == [9, 9]
    assert bool(
        (loud.masked_fill(~keep, torch.inf).amin(1) >= loud.masked_fill(keep, 0).amax(1)).all()
    )


@pytest.mark.parametrize("page", ["reward"])
def test_a_reward_of_lost_answers(module: Any) -> None:
    score = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    outcome = Outcome(uids=("a", "b", "c"), kept=torch.tensor([[8, 8, 8], [2, 2, 2]]), score=score)
    assert WeightedReward([module.AnswersLost(2.0)])(outcome)["answers_lost"].tolist() == [
        [-2.0, 0.0, 0.0]
    ]


@pytest.mark.slow
def test_a_policy_is_trained_evaluated_and_loaded_as_the_page_says(tmp_path: Path) -> None:
    _, policy, load = blocks("pruner", "python")
    for folder in ("src", "conf"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "src/tprl/pruners/matching.py").write_text(policy)
    (tmp_path / "conf/policy/matching.yaml").write_text(blocks("pruner", "yaml")[1])
    commands = re.findall(
        r"^    (python -m src\..*matching.*)$", (DOCS / "howto-pruner.md").read_text(), re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        words = [
            *shlex.split(command)[1:],
            "logger=none",
            *(["cache=null"] if "src.train" in command else []),
        ]
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, timeout=300)
    program = f"import src\n{load}\nprint(type(pruner).__module__, pruner.trained_on['stages'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.split()[0] == "tprl.pruners.matching"
    rows = (tmp_path / "runs/matching/results.csv").read_text()
    assert "matching_lfd," in rows


@pytest.mark.slow
def test_a_stage_is_one_file_and_one_yaml_and_runs_to_its_end(tmp_path: Path) -> None:
    for folder in ("src", "conf"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    before = files_below(tmp_path)
    (tmp_path / "src/tprl/stages/center.py").write_text(block("stage", "python"))
    (tmp_path / "conf/stage/center.yaml").write_text(block("stage", "yaml"))
    assert files_below(tmp_path) - before == {"src/tprl/stages/center.py", "conf/stage/center.yaml"}
    (command,) = re.findall(
        r"^    (python -m .*)$", (DOCS / "howto-stage.md").read_text(), re.MULTILINE
    )
    words = [
        *shlex.split(command)[1:],
        "model=toy",
        "dataset=toy",
        "policy.code_width=0",
        "logger=csv",
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    run = tmp_path / "runs/center"
    assert f"next: python -m src.eval run={run} 'pruners=[random]'" in done.stdout
    assert json.loads((run / "done.json").read_text())["overrides"][:2] == [
        "stage=center",
        "stage.lr=3e-3",
    ]
    assert load_pruner(run).trained_on["stages"] == ["center"]
    curve, scores = json.loads((run / "curves.json").read_text()).values()
    assert len(curve) == 20
    assert [seen for seen, _ in scores] == [0, 80]
    assert curve[-1][1] < curve[0][1]
    refused = subprocess.run(
        [sys.executable, *words, "reward=fidelity"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        refused.stderr
        == "error: reward is not read: stage=center reads dataset, policy; leave it out.\n"
    )


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".py", ".yaml")
    }
