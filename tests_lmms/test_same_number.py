"""lmms-eval and our own evaluator on the same rows: the same answers, so the same number."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tests_lmms.local_task import NAME, write

ROOT = Path(__file__).parents[1]
SCENES = 40  # images; with fewer some arms answer everything right, and equal numbers say nothing
RATIO = 0.33
ARMS = ("keep_all", "divprune", "tprl", "fastv")


class Run(NamedTuple):
    """What an evaluation found."""

    accuracy: float
    answers: list[str]  # in the order of the rows


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def lmms_eval(
    task: Path, out: Path, model_args: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """The command of docs/lmms-eval.md."""
    where = (
        "--tasks",
        NAME,
        "--include_path",
        str(task.parent),
        "--output_path",
        str(out),
        "--log_samples",
    )
    words = ("--model", "tprl", "--model_args", model_args, *where, *options)
    return command("lmms_eval", *words, HF_HOME=str(task.parent / "cache"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("task"), SCENES)


@pytest.fixture(scope="module")
def ours(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    out = tmp_path_factory.mktemp("ours")
    arms = f"pruners=[{','.join(ARMS[1:])}]"
    data = ("dataset=custom", f"dataset.source={rows}", "model.max_new_tokens=64", "logger=none")
    done = command("src.eval", *data, arms, f"keep_ratios=[{RATIO}]", f"hydra.run.dir={out}")
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[str]] = {arm: [] for arm in ARMS}
    for line in (out / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        answers[sample["pruner"]].append(sample["prediction"])
    table = list(csv.DictReader((out / "results.csv").open()))
    result = {row["pruner"]: float(row["value"]) for row in table if row["metric"] == "accuracy"}
    return {arm: Run(result[arm], answers[arm]) for arm in ARMS}


def test_the_rows_tell_the_arms_apart(ours: dict[str, Run]) -> None:
    assert len({run.accuracy for run in ours.values()}) == len(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_the_number_and_every_answer_are_the_same(
    arm: str, rows: Path, ours: dict[str, Run], tmp_path: Path
) -> None:
    asked = f"pretrained=tiny_llava,pruner={arm}" + (
        "" if arm == "keep_all" else f",keep_ratio={RATIO}"
    )
    done = lmms_eval(rows, tmp_path, asked, "--batch_size", "7")
    assert done.returncode == 0, done.stderr
    (results,), (samples,) = (
        list(tmp_path.rglob("*_results.json")),
        list(tmp_path.rglob("*_samples_*.jsonl")),
    )
    lines = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()),
        key=lambda item: item["doc_id"],
    )
    reference = Run(
        json.loads(results.read_text())["results"][NAME]["exact,none"],
        [item["filtered_resps"].strip() for item in lines],
    )
    print(
        f"{arm}: lmms-eval {reference.accuracy:.4f}, tprl "
        f"{ours[arm].accuracy:.4f}, {len(reference.answers)} answers"
    )
    assert reference.answers == [answer.strip() for answer in ours[arm].answers]
    assert reference.accuracy == pytest.approx(ours[arm].accuracy, abs=1e-12)


def test_a_wrong_argument_ends_the_process_with_one_sentence(rows: Path, tmp_path: Path) -> None:
    done = lmms_eval(rows, tmp_path, "pretrained=tiny_llava,pruner=divprune,keep_ratio=1.7")
    assert done.returncode == 2
    assert "\nerror: keep_ratio must be a number in (0, 1], got 1.7" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
