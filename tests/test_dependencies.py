"""pyproject.toml declares what the code imports, and nothing more."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = {"PIL": "pillow", "hydra": "hydra-core", "yaml": "pyyaml", "lmms_eval": "lmms-eval"}
OURS = {"tprl", "src", "tests", "tests_lmms"}
# What is imported only where its extra is installed, or never by name.
NEVER_IMPORTED = {
    "bitsandbytes",
    "hydra-joblib-launcher",
    "hydra-submitit-launcher",
    "num2words",
    "playwright",
}


def names(requirements: list[str]) -> set[str]:
    """Distributions, without their versions."""
    return {
        re.split(r"[<>=!~\[; ]", text, maxsplit=1)[0].lower().replace("_", "-")
        for text in requirements
    }


def extras() -> set[str]:
    """Distributions of all extras that users install."""
    groups = PROJECT["optional-dependencies"]
    return set().union(*(names(group) for extra, group in groups.items() if extra != "dev"))


def imported(folder: str) -> set[str]:
    """Distributions that the Python files below `folder` import, ours and the standard library left
    out."""
    modules: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    outside = modules - OURS - set(sys.stdlib_module_names)
    return {PACKAGE.get(name, name).lower().replace("_", "-") for name in outside}


def test_everything_imported_is_declared() -> None:
    extras = {
        name
        for extra, group in PROJECT["optional-dependencies"].items()
        if extra != "dev"
        for name in names(group)
    }
    assert imported("src") - names(PROJECT["dependencies"]) - extras == set()


def test_everything_declared_is_imported() -> None:
    assert names(PROJECT["dependencies"]) - imported("src") == set()
    extras = {
        name
        for extra, group in PROJECT["optional-dependencies"].items()
        if extra != "dev"
        for name in names(group)
    }
    assert extras - NEVER_IMPORTED - imported("src") == set()


def test_what_private_members_are_used_of_has_an_upper_bound() -> None:
    (lightning,) = [text for text in PROJECT["dependencies"] if text.startswith("lightning")]
    assert "<" in lightning


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), text
