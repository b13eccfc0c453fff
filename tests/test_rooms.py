"""The rooms of the house: who may import whom, and that no two rooms import each other."""

import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# A room imports from the lines above its own; within a line in one direction.
FLOORS = (
    {"errors", "kinds", "seeding", "types"},
    {"runtime", "budget", "splice", "cost", "build"},
    {"data", "lvlm", "policy", "rewards"},
    {"pruners", "rl"},
    {"scoring"},
    {"stages", "evaluation", "pretraining"},
    {"bench"},
    {"report"},
    {"api", "demo", "integrations", "serving"},
    {"commands"},
)
HYDRA = ("hydra", "omegaconf")
KNOW_HYDRA = {"commands", "build"}
# What Hydra has left in a run, and the overrides of another program's command line.
READ_YAML = {"runtime/run_directory.py", "evaluation/sweep.py", "integrations/lmms_eval_model.py"}


def _house() -> Any:
    spec = importlib.util.spec_from_file_location("house", ROOT / "experiments/house/measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = _house()
SOURCES = house.library_here()


def room_of_file(path: str) -> str:
    return house.room_of(path.removesuffix(".py").replace("/", "."))


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of_file(path) for path in SOURCES} - {"__init__"}
    assert rooms == set().union(*FLOORS)


def test_no_rooms_import_each_other() -> None:
    assert house.knots(house.arrows(SOURCES)) == []


def test_imports_go_down() -> None:
    wrong = {
        f"{a} -> {b}": imports
        for (a, b), imports in house.arrows(SOURCES).items()
        if floor_of(b) > floor_of(a)
    }
    assert wrong == {}


def test_runtime_serves_every_room_and_needs_none() -> None:
    needed = {b for a, b in house.arrows(SOURCES) if a == "runtime"}
    assert needed <= {"errors", "types"}


def test_only_commands_know_hydra() -> None:
    pattern = re.compile(rf"^ *(import|from) ({'|'.join(HYDRA)})\b", re.MULTILINE)
    knowing = {path for path, text in SOURCES.items() if pattern.search(text)}
    assert {path for path in knowing if room_of_file(path) not in KNOW_HYDRA} == READ_YAML


class TestGraph:
    """The script that draws it."""

    @pytest.mark.parametrize(
        "last", ["from tprl.a.x import y", "def f():\n    from tprl.a import x", "import tprl.a.x"]
    )
    def test_a_cycle_is_seen_wherever_the_import_stands(self, last: str) -> None:
        sources = {"a/x.py": "from tprl.b.x import y", "b/x.py": "from tprl import c", "c.py": last}
        assert house.knots(house.arrows(sources)) == [["a", "b", "c"]]

    def test_a_chain_is_no_knot(self) -> None:
        sources = {f"{a}/x.py": f"from tprl.{b} import x" for a, b in pairwise("abcd")} | {
            "d/x.py": "import os"
        }
        assert house.knots(house.arrows(sources)) == []
        assert set(house.arrows(sources)) == set(pairwise("abcd"))

    def test_density_is_counted_as_the_readme_says(self) -> None:
        head = '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n\n'
        text = head + "    # why\n    return [[y for y in z] for z in x]  # how\n"
        assert house.comments(text)[:2] == (2, 2)
        assert house.nested_comprehensions(text) == 1
        assert house.function_lengths({"a.py": text}) == [3]
