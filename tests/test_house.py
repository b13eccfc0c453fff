"""Configs, command lines and packaging."""

import ast
import json
import os
import shlex
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import tprl
from tprl.build import MOVED, build, choices, conf_dir, load_component
from tprl.commands.entry import addable, command_line, launch
from tprl.errors import UserError

ROOT = Path(__file__).parents[1]
GROUPS = [
    "stage",
    "model",
    "pruner",
    "policy",
    "reward",
    "dataset",
    "trainer",
    "logger",
    "experiment",
    "debug",
]
EVERY = [(group, name) for group in GROUPS for name in choices(group)]
EVAL_GROUPS = {"model", "pruner", "dataset", "logger"}


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose(name, overrides=list(overrides))


def started(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def targets(node: object) -> list[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    own = [node["_target_"]] if isinstance(node, dict) and "_target_" in node else []
    return own + [target for child in children for target in targets(child)]


class TestConfigs:
    def test_every_group_is_a_directory_with_choices(self) -> None:
        assert all(choices(group) for group in GROUPS)

    def test_a_group_is_listed_sorted(self) -> None:
        assert choices("stage") == [
            "adapt",
            "all",
            "autoencoder",
            "distill",
            "lfd",
            "ppo",
            "pretrain",
        ]

    @pytest.mark.parametrize(("group", "name"), EVERY)
    def test_every_choice_composes_for_training(self, group: str, name: str) -> None:
        plain = OmegaConf.to_container(composed("train", f"{group}={name}"), resolve=True)
        assert isinstance(plain, dict)
        assert {"stage", "model", "dataset", "policy", "reward", "trainer", "seed"} <= plain.keys()
        # these change others, or are nothing
        assert group in plain or group in ("experiment", "debug", "logger")
        allowed = ("tprl.", "torch.optim.", "lightning.pytorch.")
        assert all(target.startswith(allowed) for target in targets(plain.get(group)))

    @pytest.mark.parametrize(("group", "name"), [pair for pair in EVERY if pair[0] in EVAL_GROUPS])
    def test_every_choice_composes_for_evaluation(self, group: str, name: str) -> None:
        plain = OmegaConf.to_container(composed("eval", f"{group}={name}"), resolve=True)
        assert isinstance(plain, dict)
        assert {"model", "dataset", "keep_ratios", "split"} <= plain.keys()
        assert group in plain or group == "logger"

    @pytest.mark.parametrize("stage", choices("stage"))
    def test_debug_fast_changes_settings_that_the_stage_has(self, stage: str) -> None:
        def keys(node: Any) -> set[str]:
            below = {
                f"{key}.{name}"
                for key, value in node.items()
                if isinstance(value, DictConfig)
                for name in keys(value)
            }
            return {str(key) for key in node} | below

        usual, fast = (
            composed("train", f"stage={stage}"),
            composed("train", f"stage={stage}", "debug=fast"),
        )
        assert keys(fast) == keys(usual)
        assert fast.stage != usual.stage

    @pytest.mark.parametrize("name", ["train", "eval", "demo"])
    def test_the_defaults_are_the_embedded_model_and_dataset(self, name: str) -> None:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = compose(name, return_hydra_config=True)
        chosen = config.hydra.runtime.choices
        assert (chosen.model, chosen.dataset) == ("tiny_llava", "scenes")


class TestBuild:
    def test_builds_an_allowed_target_with_plain_containers(self) -> None:
        node = OmegaConf.create(
            {"_target_": "tprl.types.Sample", "uid": "a", "images": [], "question": "?"}
        )
        sample = build(node, answers=("yes",))
        assert (sample.uid, sample.answers) == ("a", ("yes",))
        assert type(sample.images) is list

    def test_a_partial_waits_for_its_live_objects(self) -> None:
        node = {"_target_": "tprl.budget.budget", "_partial_": True, "keep_ratio": 0.5}
        assert build(node)(n=10) == 5
        assert build(node, n=10) == 5

    @pytest.mark.parametrize(
        "target",
        [
            "os.system",
            "builtins.eval",
            "tprl.build.inspect.sys.exit",
            "tprlx.a",
            "tprl",
            "tprl.types.Tensor",
            "tprl.build.OmegaConf.load",
        ],
    )
    def test_other_targets_are_rejected(self, target: str) -> None:
        with pytest.raises(UserError, match=r"_target_ .* is not allowed"):
            build({"_target_": target})

    @pytest.mark.parametrize(
        ("target", "typo", "known"),
        [
            ("tprl.lvlm.llava.Llava", "micro_bach", "micro_batch"),
            ("tprl.pruners.tprl.TPRL", "qualty", "quality"),
        ],
    )
    def test_options_that_go_to_a_base_class_are_checked_against_it(
        self, target: str, typo: str, known: str
    ) -> None:
        with pytest.raises(UserError, match=rf"has no argument {typo}; it takes: .*\b{known}\b"):
            build({"_target_": target, "_partial_": True, typo: 1})
        assert build({"_target_": target, "_partial_": True, known: 1}).keywords == {known: 1}

    def test_nested_targets_are_checked_too(self) -> None:
        with pytest.raises(UserError, match=r"os\.getcwd is not allowed"):
            build({"_target_": "tprl.types.Sample", "uid": [{"_target_": "os.getcwd"}]})

    def test_an_unknown_argument_lists_the_known_ones(self) -> None:
        with pytest.raises(UserError, match="no argument rate; it takes: keep_ratio, n"):
            build({"_target_": "tprl.budget.budget", "rate": 1})

    def test_a_missing_module_and_a_missing_target_say_so(self) -> None:
        with pytest.raises(UserError, match="cannot be imported"):
            build({"_target_": "tprl.nowhere.Thing"})
        with pytest.raises(UserError, match="no _target_"):
            build({"a": 1})

    def test_a_user_error_inside_a_nested_component_stays_one(self) -> None:
        inner = {"_target_": "tprl.budget.check_keep_ratio", "keep_ratio": 1.7}
        with pytest.raises(UserError, match=r"keep_ratio must be .*, got 1\.7"):
            build({"_target_": "tprl.types.Sample", "uid": inner})

    @pytest.mark.parametrize(("old", "new"), MOVED.items())
    def test_settings_of_before_a_module_moved_name_what_is_there_now(
        self, old: str, new: str
    ) -> None:
        assert find_spec(new)
        with pytest.raises(ModuleNotFoundError):
            import_module(old)

    def test_a_moved_target_is_built_wherever_it_stands(self, tmp_path: Path) -> None:
        old = {
            "_target_": "tprl.metrics_csv.MetricsCSV",
            "save_dir": str(tmp_path),
            "name": "",
            "version": "",
        }
        assert type(build(old)).__module__ == "tprl.runtime.metrics_csv"
        sample = build(
            {
                "_target_": "tprl.types.Sample",
                "uid": "a",
                "images": [old],
                "question": "?",
                "answers": [],
            }
        )
        assert type(sample.images[0]).__module__ == "tprl.runtime.metrics_csv"

    def test_a_component_is_built_without_hydra(self) -> None:
        assert load_component("pruner", "random").name == "random"
        with pytest.raises(
            UserError, match="pruner=rnd does not exist; choose one of: attention_dpp, cdpruner, "
        ):
            load_component("pruner", "rnd")


class TestCommandLine:
    @pytest.mark.parametrize(
        ("word", "seen"),
        [
            ("model.placement=shard", "++model.placement=shard"),
            ("pruner.published=true", "++pruner.published=true"),
            ("model=llava", "model=llava"),
            ("stage.keep_ratio=0.3", "stage.module.keep_ratio=0.3"),
            ("+model.attention=sdpa", "+model.attention=sdpa"),
            ("--help", "--help"),
        ],
    )
    def test_any_argument_of_a_component_can_be_set(self, word: str, seen: str) -> None:
        assert addable(word) == seen

    @pytest.mark.parametrize("entry", ["train", "eval", "demo", "export"])
    def test_a_process_ends_with_one_line_and_status_2(self, entry: str) -> None:
        done = started("-m", f"src.{entry}", "model=foo")
        assert done.returncode == 2
        assert (
            done.stderr
            == f"error: model=foo does not exist; choose one of: {', '.join(choices('model'))}.\n"
        )

    @pytest.mark.parametrize(
        ("option", "sentence"),
        [
            (
                "stage=foo",
                (
                    "stage=foo does not exist; choose one of: adapt, "
                    "all, autoencoder, distill, lfd, ppo, pretrain."
                ),
            ),
            ("pruner=foo", "pruner=foo does not exist; choose one of: attention_dpp, cdpruner, "),
            ("experiment=foo", "experiment=foo does not exist; choose one of: demo, internvl3, "),
            (
                "stage.foo=1",
                (
                    "stage.foo is not a key here, because stage=all "
                    "runs several stages: name the stage, as in "
                ),
            ),
            ("foo=1", "foo is not a key here; there are: cache, dataset, "),
            ("seed", "the option 'seed' cannot be read ("),
            ("hydra.run.dir=/proc/tprl", "cannot write to /proc/tprl ("),
            (
                f"hydra.run.dir={ROOT}/LICENSE/x",
                f"cannot write to {ROOT}/LICENSE/x (Not a directory); choose another",
            ),
        ],
    )
    def test_bad_options_are_one_sentence(
        self,
        option: str,
        sentence: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.status(monkeypatch, option) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {sentence}")
        assert line.count("\n") == 1

    def test_a_bad_choice_in_a_sweep_stops_it_before_its_first_job(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "-m", "stage=lfd,foo", f"hydra.sweep.dir={tmp_path}") == 2
        assert "error: stage=foo does not exist" in capsys.readouterr().err
        assert not list(tmp_path.glob("*/done.json"))

    def test_a_run_prints_its_directory(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, f"hydra.run.dir={tmp_path}") == 0
        assert (
            capsys.readouterr().out == f"run: {tmp_path}\nnext: python -m src.demo run={tmp_path}\n"
        )
        assert (tmp_path / "done.json").exists()

    def test_a_user_error_of_the_work_is_one_sentence_and_leaves_failed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "seed=13", f"hydra.run.dir={tmp_path}") == 2
        assert capsys.readouterr().err == "error: 13 is unlucky.\n"
        assert "13 is unlucky" in (tmp_path / "FAILED").read_text()
        assert not (tmp_path / "done.json").exists()

    def test_a_bug_keeps_its_traceback(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            self.status(monkeypatch, "seed=99", f"hydra.run.dir={tmp_path}")
        assert "ZeroDivisionError" in (tmp_path / "FAILED").read_text()

    def test_a_full_disk_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "seed=28", f"hydra.run.dir={tmp_path}") == 2
        assert capsys.readouterr().err.startswith(
            "error: cannot write to /x/y (No space left on device); "
        )

    def test_a_sweep_goes_on_after_a_failure_and_skips_what_is_done(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        sweep = ("-m", "seed=1,13,2", f"hydra.sweep.dir={tmp_path}")
        assert self.status(monkeypatch, *sweep) == 2
        assert (self.ran(tmp_path), (tmp_path / "1/FAILED").exists()) == (
            {"0": "1\n", "2": "2\n"},
            True,
        )
        assert capsys.readouterr().err.endswith("error: 13 is unlucky.\n")

        monkeypatch.setattr(self, "unlucky", 14, raising=False)
        assert self.status(monkeypatch, *sweep) == 0
        # one line each: none ran twice
        assert self.ran(tmp_path) == {"0": "1\n", "1": "13\n", "2": "2\n"}
        assert not (tmp_path / "1/FAILED").exists()

    def test_another_sweep_does_not_overwrite_finished_jobs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert self.status(monkeypatch, "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}") == 0
        assert self.status(monkeypatch, "-m", "seed=3,1,2", f"hydra.sweep.dir={tmp_path}") == 2
        assert "holds a finished job with other settings (seed=1)" in capsys.readouterr().err
        assert self.ran(tmp_path) == {"0": "1\n", "1": "2\n", "2": "2\n"}

    def test_a_sweep_refuses_ddp(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert (
            self.status(monkeypatch, "-m", "seed=1,2", "trainer=ddp", f"hydra.sweep.dir={tmp_path}")
            == 2
        )
        assert "error: a sweep cannot run trainer.strategy=ddp" in capsys.readouterr().err

    unlucky = 13

    def work(self, config: DictConfig, directory: Path) -> None:
        if config.seed == self.unlucky:
            raise UserError(f"{config.seed} is unlucky.")
        if config.seed == 28:
            raise OSError(28, "No space left on device", "/x/y")
        if config.seed == 99:
            raise ZeroDivisionError
        with (directory / "ran").open("a") as file:
            file.write(f"{config.seed}\n")

    def status(self, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train", *options])
        try:
            launch("train", self.work)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    @staticmethod
    def ran(directory: Path) -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in sorted(directory.glob("*/ran"))}


class TestPackage:
    def test_a_bare_clone_runs_without_installation(self) -> None:
        # the editable install
        drop = "import sys; sys.path = [p for p in sys.path if not p.endswith('/src')]"
        done = started("-c", f"{drop}; import src.train, tprl; print(tprl.__file__)")
        assert done.stdout.strip() == str(ROOT / "src/tprl/__init__.py")

    def test_the_wheel_imports_in_an_empty_environment(self, tmp_path: Path) -> None:
        build_wheel = started("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
        assert build_wheel.returncode == 0, build_wheel.stderr
        wheel = next(tmp_path.glob("*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.partition("/")[0] for name in names} == {
            "tprl",
            f"tprl-{tprl.__version__}.dist-info",
        }
        configs = {
            f"tprl/conf/{path.relative_to(ROOT / 'conf')}"
            for path in (ROOT / "conf").rglob("*.yaml")
        }
        assert configs <= set(names)
        assert "tprl/py.typed" in names
        assert {
            f"tprl/assets/screens/{split}.zip" for split in ("val", "test", "final", "real")
        } <= set(names)

        started("-m", "venv", "--without-pip", str(tmp_path / "env"))
        python = tmp_path / "env/bin/python"
        options = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        assert started("-m", "pip", "--python", str(python), *options).returncode == 0
        code = "import tprl, sys; print(tprl.__version__, 'torch' in sys.modules, tprl.__file__)"
        shown = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert shown[:2] == [tprl.__version__, "False"]
        assert shown[2].startswith(str(tmp_path))

        installed = next((tmp_path / "env").glob("lib/*/site-packages"))
        code = "from tprl.build import conf_dir, choices; print(conf_dir(), *choices('stage'))"
        env = os.environ | {"PYTHONPATH": str(installed)}
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert found.stdout.split() == [str(installed / "tprl/conf"), *choices("stage")]

    def test_constraints_cover_every_dependency(self) -> None:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = project["dependencies"] + project["optional-dependencies"]["dev"]
        names = {text.split(">")[0].lower() for text in needed}
        pinned = {
            line.split("==")[0].lower()
            for line in (ROOT / "constraints.txt").read_text().splitlines()
        }
        assert names - pinned == set()


class TestWandbRunsEnd:
    """A run that stays open is continued by the next job of a sweep; one that failed must not look
    finished."""

    @pytest.mark.parametrize(("fails", "status"), [(False, 0), (True, 1)])
    def test_with_the_status_of_the_job(
        self, fails: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        closed: list[int] = []
        fake = SimpleNamespace(run=object(), finish=lambda exit_code: closed.append(exit_code))
        monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "argv", ["train", f"hydra.run.dir={tmp_path}"])

        def work(config: DictConfig, directory: Path) -> None:
            if fails:
                raise RuntimeError("broken")

        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                launch("train", work)
        else:
            launch("train", work)
        assert closed == [status]
        assert (tmp_path / "FAILED").exists() == fails
        assert (tmp_path / "done.json").exists() == (not fails)


def test_done_json_names_the_overrides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "seed=5", f"hydra.run.dir={tmp_path}"])
    launch("train", lambda config, directory: None)
    assert json.loads((tmp_path / "done.json").read_text())["overrides"] == ["seed=5"]


def test_a_job_knows_its_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []

    def work(config: DictConfig, directory: Path) -> None:
        found.append(command_line())

    assert command_line() == ""
    words = [
        "stage=ppo",
        "seed=5",
        "model.placement=replicate",
        "stage.keep_ratio=[0.5,0.1]",
        f"hydra.run.dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    launch("train", work)
    shell = shlex.split(found[0])
    assert shell[:3] == ["python", "-m", "src.train"]
    assert [word.lstrip("+") for word in shell[3:]] == words


class TestAir:
    """Lines of at most 100 columns, files of at most 400 lines, functions of at most 70."""

    FOLDERS = ("src", "tests", "tests_lmms", "tests_openvino", "tests_vllm", "examples")
    FURTHER = ("experiments", "docs")

    def python_files(self) -> list[Path]:
        folders = [ROOT / folder for folder in self.FOLDERS + self.FURTHER]
        paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        return [path for path in paths if "node_modules" not in path.parts]

    def test_no_line_is_over_100_columns(self) -> None:
        wide = []
        for path in self.python_files():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if len(line) > 100:
                    wide.append(f"{path.relative_to(ROOT)}:{number}")
        assert wide == []

    def test_no_file_of_the_library_is_over_400_lines(self) -> None:
        lengths = {
            str(path.relative_to(ROOT)): len(path.read_text().splitlines())
            for path in (ROOT / "src").rglob("*.py")
        }
        assert {path: length for path, length in lengths.items() if length > 400} == {}

    def test_no_function_of_the_library_is_over_70_lines(self) -> None:
        """From `def` to its end, without docstring and blank lines."""
        long = []
        for path in (ROOT / "src").rglob("*.py"):
            lines = path.read_text().splitlines()
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    docstring = ast.get_docstring(node, clean=False) or ""
                    body = text.replace(docstring, "", 1)
                    if sum(bool(line.strip()) for line in body.splitlines()) > 71:
                        long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
        assert long == []
