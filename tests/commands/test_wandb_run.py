"""Every metric that docs/metrics.md promises is in an offline run of stage=all, over its axis, and
no other."""

import re
import sys
from pathlib import Path

import pytest
from tests.wandb_files import OfflineRun, offline_runs

from tprl.commands.entry import launch
from tprl.commands.train import train

DOCS = Path(__file__).parents[2] / "docs/metrics.md"
SECTIONS = (
    "`stage=autoencoder`",
    "`stage=lfd`",
    "`stage=ppo`",
    "`stage=adapt`",
    "An evaluation in W&B",
)
AXES = {"samples_seen", "keep_ratio", "trainer/global_step", "epoch"}
NOT_HERE = {  # of the sections above, what this run has no reason to log
    "eval/<pruner>/mean_iou",  # no boxes
    "eval/<pruner>/<dataset>/<name>",  # no published number
    "time/credit",  # one decision per token, budget=lagrange: no draws to credit
}
# Between them these settings log everything that depends on settings.
OPTIONS = (
    "reward=score_change",
    "policy.select=topk",
    "stage.ppo.budget=lagrange",
    "stage.ppo.advantage=gae",
    "logger.overlay_every=1",
)


def documented(sections: tuple[str, ...] = SECTIONS) -> list[str]:
    """Names in the first column of the tables of these sections, `{a,b}` expanded."""
    parts = re.split(r"^## ", DOCS.read_text(), flags=re.MULTILINE)
    chosen = [part for part in parts if part.startswith(sections)]
    cells = [
        line.split("|")[1]
        for part in chosen
        for line in part.splitlines()
        if line.startswith("| `")
    ]
    return [
        name
        for cell in cells
        for written in re.findall("`(.+?)`", cell)
        for name in expanded(written)
    ]


def expanded(name: str) -> list[str]:
    braces = re.search(r"\{(.*)\}", name)
    if braces is None:
        return [name]
    return [name.replace(braces[0], word) for word in braces[1].split(",")]


def pattern(name: str) -> re.Pattern[str]:
    """`lfd/served/accuracy@<ratio>` as an expression for whole names; a pruner's may hold its
    seed."""
    text = re.escape(name).replace("<pruner>", "[^/]+(/seed[0-9]+)?").replace("<dataset>", "toy")
    return re.compile(re.sub("<[a-z]+>", "[^/]+", text))


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    folder = tmp_path_factory.mktemp("runs") / "all"
    before = sys.argv
    sys.argv = [
        "train",
        "model=toy",
        "dataset=toy",
        "pruner=cls_attention",
        "debug=fast",
        *OPTIONS,
        f"hydra.run.dir={folder}",
    ]
    try:
        launch("train", train)
    finally:
        sys.argv = before
    (run,) = offline_runs(folder)
    return run


def test_documented_metrics_are_logged(offline: OfflineRun) -> None:
    logged = {name for row in offline.rows for name in row}
    missing = [name for name in documented() if not any(map(pattern(name).fullmatch, logged))]
    assert set(missing) == NOT_HERE
    assert logged >= AXES


def test_logged_metrics_are_documented(offline: OfflineRun) -> None:
    logged = {name for row in offline.rows for name in row}
    known = [pattern(name) for name in documented()]
    assert {
        name for name in logged - AXES if not any(item.fullmatch(name) for item in known)
    } == set()


def test_every_metric_is_drawn_over_its_axis(offline: OfflineRun) -> None:
    assert {name for name, axis in offline.axes.items() if axis is None} == AXES
    for row in offline.rows:
        for name in row.keys() - AXES:
            axis = "keep_ratio" if name.startswith("eval/") else "samples_seen"
            assert offline.axes[name] == axis
            assert axis in row or name == "eval/results"


def test_the_axis_counts_the_samples_of_each_stage(offline: OfflineRun) -> None:
    counts = {
        name: [row.get("samples_seen") for row in offline.rows if name in row]
        for name in offline.axes
    }
    assert counts["autoencoder/mse"] == [432]  # 18 of 20 images of 24 tokens
    assert counts["lfd/loss"] == counts["lfd/served"] == counts["lfd/mlp/loss"] == [50]
    assert counts["ppo/kl"] == [8, 16]
    assert counts["ppo/overlays"] == [0, 8, 16]
    assert counts["adapt/loss"] == [45 * epoch for epoch in range(1, 16)]
    ratios = [row["keep_ratio"] for row in offline.rows if "eval/tprl/accuracy" in row]
    assert ratios == [0.0278, 0.0556, 0.1111, 0.3333]


def test_pictures_are_captioned_with_the_answers(offline: OfflineRun) -> None:
    first = next(row["ppo/overlays"] for row in offline.rows if "ppo/overlays" in row)
    # so many images do the ten questions show
    assert first["count"] == len(set(first["captions"])) == 2
    assert all(
        re.search(r"\(all tokens: '.*', 1 of 24: '.*'\)$", caption) for caption in first["captions"]
    )


def test_the_config_is_plain_and_whole(offline: OfflineRun) -> None:
    config = offline.config
    assert config["stage"]["ppo"]["module"]["budget"] == "lagrange"
    assert config["arguments/ppo"]["gamma"] == 0.99  # a default that no yaml holds
    assert config["arguments/lfd/mlp"]["log_as"] == "lfd/mlp"
    assert config["environment"]["threads"] >= 1
    assert offline.about["job_type"] == "all"
