"""The wheel, the bare clone, and the pinned dependencies."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.processes import ROOT, started

import tprl
from tprl.build import choices


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


def test_make_plans_engine_environments_before_they_are_there(tmp_path: Path) -> None:
    """Make expands every line of a recipe before it runs the first one."""
    there = [f"{name}={tmp_path / name}" for name in ("VLLM", "OPENVINO", "LMMS")]
    words = ["make", "--dry-run", *there, "test-vllm", "test-openvino", "test-lmms"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "-m pytest tests_vllm" in done.stdout
