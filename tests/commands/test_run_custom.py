"""One's own rows through the commands: damaged ones counted, answers not needed, boxes read, two
runs compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.commands.calls import call, refused

from tprl.commands import evaluate as evaluation
from tprl.commands.evaluate import evaluate, evaluate_entries
from tprl.commands.train import train
from tprl.data.scenes import Scenes
from tprl.evaluation.results import read_results, read_samples

FAST = ("logger=none", "dataset=custom", "dataset.max_bad_rows=0.1")
SMALL = ("policy.code_width=0", "stage.served.limit=10")
LFD = ("stage=lfd", "stage.demonstrations=20", "stage.epochs=1", *SMALL)
PPO = (
    "stage=ppo",
    "stage.iterations=2",
    "stage.prompts=4",
    "stage.group=2",
    "stage.calibrate=null",
    *SMALL,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows about 16 pictures of `scenes`; one has a damaged image, and one an empty question."""
    folder, scenes, rows = tmp_path_factory.mktemp("data"), Scenes("val"), []
    for index in range(80):
        sample = scenes[index]
        name = f"{index // 5}.png"
        if index % 5 == 0:
            sample.images[0].save(folder / name)
        row: dict[str, Any] = {
            "image": name,
            "question": sample.question,
            "split": ("train", "val", "test")[index % 3],
        }
        rows.append(row | ({"box": sample.box} if sample.box else {"answers": sample.answers[0]}))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    rows[2]["image"], rows[5]["question"] = "broken.png", ""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [{name: row[name] for name in ("image", "question", "split")} for row in rows]
    (folder / "unlabelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return folder


@pytest.fixture(scope="module")
def lfd(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that was taught on rows without answers."""
    source = (f"dataset.source={folder / 'unlabelled.jsonl'}", "dataset.labelled=false")
    return call("train", train, tmp_path_factory.mktemp("lfd"), *FAST, *source, *LFD)


def test_an_evaluation_says_what_it_counted(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = []

    def spy(*args: Any) -> evaluation.Evaluated:
        counted.append(evaluate_entries(*args))
        return counted[-1]

    monkeypatch.setattr(evaluation, "evaluate_entries", spy)
    options = (
        "logger=none",
        "dataset=custom",
        f"dataset.source={folder / 'rows.jsonl'}",
        "dataset.max_bad_rows=0.1",
        "dataset.coordinates=relative",
        "pruners=[divprune,random]",
        "keep_ratios=[0.5]",
    )
    run = call("eval", evaluate, tmp_path / "eval", *options)
    about = json.loads((run / "evaluation.json").read_text())
    assert (about["questions"], about["damaged rows"], about["damaged: broken image"]) == (24, 2, 1)
    assert about["damaged: empty question"] == 1
    # what a model card and a promise say of it
    assert [item.questions for item in counted] == [24]
    assert about["protocol"].endswith("boxes in relative coordinates")
    rows = {(row.pruner, row.metric): row.value for row in read_results(run / "results.csv")}
    assert rows["keep_all", "custom/accuracy"] == pytest.approx(100 * rows["keep_all", "accuracy"])
    # all but the boxes, which it writes in another form
    assert 60 < rows["keep_all", "custom/accuracy"] < 90
    assert not any(metric == "accuracy/" for _, metric in rows)
    assert len(read_samples(run / "samples.jsonl")) == 3 * 24
    printed = capsys.readouterr().out
    assert "custom/accuracy" in printed
    assert "accuracy (%)" not in printed
    assert "protocol: own data" in printed
    call(
        "eval",
        evaluate,
        tmp_path / "compared",
        f"compare=[{run}:divprune,{run}:random]",
        "logger=none",
    )
    assert (
        (tmp_path / "compared" / "compare.csv")
        .read_text()
        .splitlines()[1]
        .startswith("divprune,random,0.5,24,")
    )


def test_ppo_without_any_answer(folder: Path, lfd: Path, tmp_path: Path) -> None:
    source = (f"dataset.source={folder / 'unlabelled.jsonl'}", "dataset.labelled=false")
    options = (f"stage.init_from={lfd}", "reward=fidelity")
    run = call("train", train, tmp_path / "ppo", *FAST, *source, *PPO, *options)
    about = json.loads((run / "pruner" / "config.json").read_text())
    assert about["trained_on"]["stages"][-1] == "ppo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            PPO,
            "stage=ppo reads answers, and dataset custom has none (dataset.labelled=false): use "
            "stage=lfd, and",
        ),
        (("stage=all",), "stage=ppo reads answers, and dataset custom has none"),
    ],
)
def test_answers_that_are_needed(
    options: tuple[str, ...],
    message: str,
    folder: Path,
    lfd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = (f"dataset.source={folder / 'unlabelled.jsonl'}", "dataset.labelled=false")
    if options is PPO:
        options = (*options, f"stage.init_from={lfd}")
    assert message in refused(capsys, "train", tmp_path / "run", *FAST, *source, *options)


@pytest.fixture(scope="module")
def long_answers(folder: Path) -> Path:
    """Six questions, of three parts, with answers of twenty words."""
    rows = [
        {"image": f"{number}.png", "question": "which?", "answers": "red " * 20, "split": split}
        for number, split in enumerate(("train", "val", "test") * 2)
    ]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "long.jsonl"


@pytest.mark.parametrize(
    ("name", "options"),
    [("eval", ("pruner=random",)), ("train", LFD), ("train", ("stage=all",))],
    ids=str,
)
def test_answers_longer_than_the_model_writes(
    name: str,
    options: tuple[str, ...],
    long_answers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("dataset=custom", f"dataset.source={long_answers}", "logger=none", *options)
    output = refused(capsys, name, tmp_path / "run", *words)
    assert (
        "none of the 2 reference answers of custom can be written within model.max_new_tokens=16"
        in output
    )
    assert output.endswith("set model.max_new_tokens=20.")
    assert not (tmp_path / "run" / "autoencoder").exists()  # nothing was trained


def test_some_answers_longer_than_the_model_writes(
    folder: Path, long_answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = json.dumps({"image": "0.png", "question": "what?", "answers": "red", "split": "test"})
    (folder / "mixed.jsonl").write_text(long_answers.read_text() + short)
    options = (
        "dataset=custom",
        f"dataset.source={folder / 'mixed.jsonl'}",
        "logger=none",
        "pruner=uniform",
    )
    call("eval", evaluate, tmp_path / "run", *options, "keep_ratios=[0.5]")
    output = " ".join("".join(capsys.readouterr()).split())
    assert "2 of 3 reference answers of custom cannot be written" in output


def test_the_number_that_is_printed_is_the_published_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes, rows = Scenes("val"), []
    for index in (0, 5, 10):
        scenes[index].images[0].save(tmp_path / f"{index}.png")
        rows.append(
            {
                "index": index,
                "question": "which color is there?",
                "hint": None,
                "A": "red",
                "B": "green",
                "C": None,
            }
            | {
                "D": None,
                "answer": "A",
                "category": "c",
                "L2-category": "k",
                "image": f"{index}.png",
                "split": "dev",
            }
        )
    source = tmp_path / "dev.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = call(
        "eval",
        evaluate,
        tmp_path / "run",
        "logger=none",
        "dataset=mmbench",
        f"dataset.source={source}",
        "pruner=random",
    )
    printed = capsys.readouterr().out
    result = {
        row.metric: row.value
        for row in read_results(run / "results.csv")
        if row.pruner == "keep_all"
    }
    assert "mmbench/accuracy" in printed
    # a single pruner beside all tokens
    assert "differences of the mean score over questions:" not in printed
    assert "accuracy (%)" not in printed
    assert {"mmbench/accuracy", "mmbench/vanilla"} <= set(result)


def test_parity_reads_any_dataset(folder: Path, tmp_path: Path) -> None:
    options = (
        "mode=parity",
        "dataset=custom",
        f"dataset.source={folder / 'rows.jsonl'}",
        "dataset.max_bad_rows=0.1",
    )
    call("eval", evaluate, tmp_path / "run", "logger=none", *options, "split=train", "limit=3")
    assert (tmp_path / "run" / "parity.md").is_file()
