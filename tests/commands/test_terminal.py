"""Help pages, the next command, and log lines beside a live bar."""

import io
import logging
import re
import shlex
import sys
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tprl.build import choices, conf_dir
from tprl.commands.entry import addable, launch
from tprl.commands.terminal import ConsoleHandler, next_command

RUN = Path("/runs/my run")


@lru_cache
def help_of(name: str, *words: str) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", [f"src.{name}", *words, "--help"])
        with pytest.raises(SystemExit):
            launch(name, lambda config, directory: directory)
    return out.getvalue()


@pytest.mark.parametrize("name", ["train", "eval", "demo", "export"])
class TestHelp:
    def test_it_is_short_and_lists_the_choices_of_every_group(self, name: str) -> None:
        text = help_of(name)
        assert len(text.splitlines()) < 80
        assert max(map(len, text.splitlines())) <= 120
        defaults = OmegaConf.load(conf_dir() / f"{name}.yaml")["defaults"]  # type: ignore[index]
        groups = [
            key
            for entry in defaults
            if OmegaConf.is_dict(entry)
            for key in entry
            if " " not in str(key)
        ]
        summary = " ".join(text.split())
        for group in (
            groups if name == "train" else [g for g in groups if g not in ("experiment", "debug")]
        ):
            assert f"{group} {', '.join(choices(str(group)))}" in summary, group

    def test_its_options_exist_and_have_the_values_it_says(self, name: str) -> None:
        options = help_of(name).partition("Options")[2]
        summary = dict(re.findall(r"^  ([a-z_]+)=(\S+)", options, re.MULTILINE))
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = compose(name)
        main = {
            "train": {"seed", "resume"},
            "eval": {"run", "sweep", "keep_ratios", "mode"},
            "demo": {"run", "port"},
        }
        main["export"] = {"run", "target", "keep_ratio"}
        assert main[name] <= summary.keys()
        for key, value in summary.items():
            assert OmegaConf.create({"value": config[key]}) == OmegaConf.from_dotlist(
                [f"value={value}"]
            )

    def test_its_examples_compose(self, name: str) -> None:
        text = help_of(name)
        text = re.sub("<.*?>", "x", text)
        lines = [
            shlex.split(line, comments=True)
            for line in text.splitlines()
            if "python -m src." in line
        ]
        lines = [
            words
            for words in lines
            if words[2] == f"src.{name}" and not {"...", "-m"} & set(words[3:])
        ]
        assert len(lines) > 3
        for words in lines:
            with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
                compose(name, overrides=[addable(word) for word in words[3:]])


def test_help_shows_the_chosen_groups() -> None:
    assert "(here: stage=ppo model=toy " in help_of("train", "stage=ppo", "model=toy")


@pytest.mark.parametrize(
    ("stage", "words", "command"),
    [
        (
            "lfd",
            ["stage=lfd", "model=toy", "++model.x=1", "pruner=random", "stage.epochs=1", "seed=3"],
            (
                "python -m src.train stage=ppo 'stage.init_from=/runs/my "
                "run' model=toy model.x=1 seed=3"
            ),
        ),
        ("autoencoder", [], "python -m src.train stage=lfd 'stage.init_from=/runs/my run'"),
        ("ppo", ["model=toy"], "python -m src.eval 'run=/runs/my run' 'pruners=[random,divprune]'"),
        ("pretrain", [], "python -m src.train 'model.pretrained=/runs/my run/model'"),
        (
            "lfd",
            ["reward=fidelity"],
            "python -m src.train stage=ppo 'stage.init_from=/runs/my run' reward=fidelity",
        ),
        ("lfd", ["experiment=paper"], None),
        ("all", [], "python -m src.demo 'run=/runs/my run'"),
    ],
)
def test_what_to_type_next(stage: str, words: list[str], command: str | None) -> None:
    assert (
        next_command(
            "train",
            OmegaConf.create(
                {
                    "stage": OmegaConf.load(conf_dir() / "stage" / f"{stage}.yaml"),
                    "model": {"name": "llava"},
                }
            ),
            words,
            RUN,
        )
        == command
    )


def test_runs_and_sweeps_print_the_next_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["src.train", "stage=ppo", f"hydra.run.dir={tmp_path}/run"])
    launch("train", lambda config, directory: None)
    end = (
        f"run: {tmp_path}/run\nnext: python -m src.eval "
        f"run={tmp_path}/run 'pruners=[random,divprune]'\n"
    )
    assert capsys.readouterr().out == end
    monkeypatch.setattr(
        sys,
        "argv",
        ["src.train", "-m", "stage=ppo", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep"],
    )
    launch("train", lambda config, directory: None)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("next: ")] == [
        f"next: python -m src.eval sweep={tmp_path}/sweep"
    ]
    assert lines[-1].startswith("next: ")


def test_log_lines_go_where_stderr_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, later = ConsoleHandler(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "said", None, None))
    assert later.getvalue() == "said\n"
