"""What the pages of the studies print is what their scores say, and their scripts' calls exist."""

import csv
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from tprl.build import conf_dir
from tprl.commands.entry import addable

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
STUDIES = ("main_table", "crowd", "crowd_ablation", "start", "tune")
SCRIPTS = sorted(path.parent.name for path in EXPERIMENTS.glob("*/run.sh"))
ACCURACY = re.compile(r"\**(\d+\.\d)\**(?: \[(\d+\.\d), (\d+\.\d)\])?")
DIFFERENCE = re.compile(r"([+-]\d+\.\d) \[([+-]\d+\.\d), ([+-]\d+\.\d)\]")
MINUS = re.compile(r"`(\w+)` minus the others")
HALF = 0.0501  # of the last digit, with room for what a half is rounded to
Key = tuple[str, ...]
Numbers = dict[Key, list[tuple[float, list[float]]]]  # arms -> keep ratio, value and bounds in %


def cells_of(page: str) -> Iterator[tuple[str, str, Fraction, str]]:
    """Main arm of the differences, first cell, keep ratio of the column, and cell of every row."""
    main, columns = "", [None]
    for line in page.splitlines():
        if match := MINUS.match(line):
            main = match[1]
        if not line.startswith("|"):
            columns = [None]  # of the table above
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ratios = [re.search(r"\((1/\d+|2/9)\)$", cell) for cell in cells]
        if any(ratios):
            columns = [None if ratio is None else Fraction(ratio[1]) for ratio in ratios]
        for cell, ratio in zip(cells[1:], columns[1:], strict=False):
            if ratio is not None:
                yield main, cells[0], ratio, cell


def accuracies(study: Path) -> Numbers:
    """`intervals.csv`, by arm."""
    numbers: Numbers = {}
    for row in csv.DictReader((study / "intervals.csv").open()):
        if row["metric"] == "accuracy" and row["keep_ratio"]:
            values = [100 * float(row[name]) for name in ("value", "low", "high")]
            numbers.setdefault((row["pruner"],), []).append((float(row["keep_ratio"]), values))
    return numbers


def differences(study: Path) -> Numbers:
    """`paired.json`, by main arm and other."""
    numbers: Numbers = {}
    for pair in json.loads((study / "paired.json").read_text()):
        if pair["keep_ratio"] is not None:
            values = [100 * pair[name] for name in ("difference", "low", "high")]
            key = (pair["pruner"], pair["other"])
            numbers.setdefault(key, []).append((pair["keep_ratio"], values))
    return numbers


def at(numbers: Numbers, key: Key, ratio: Fraction) -> list[float] | None:
    near = [values for k, values in numbers.get(key, []) if abs(k - ratio) < 1e-3]
    return near[0] if near else None


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_a_page_is_what_the_scores_say(name: str) -> None:
    study = EXPERIMENTS / name
    mean, paired = accuracies(study), differences(study)
    count = 0
    for main, first, ratio, cell in cells_of((study / "README.md").read_text()):
        arms = re.findall(r"`(\w+)`", first)
        # A row of differences names both arms, or stands below the one that all are taken from.
        if match := DIFFERENCE.fullmatch(cell):
            pair = re.fullmatch(r"`(\w+)` minus `?(\w+)`?", first)
            names = pair.groups() if pair else (main, *arms[:1])
            values = at(paired, names, ratio)
        elif match := ACCURACY.fullmatch(cell):
            values = at(mean, tuple(arms[:1]), ratio)
        if match is None or values is None:
            continue
        printed = [float(group) for group in match.groups() if group]
        assert printed == pytest.approx(values[: len(printed)], abs=HALF), (first, ratio, cell)
        count += 1
    assert count >= 9


def test_the_table_of_the_readme_is_that_of_crowd() -> None:
    study = EXPERIMENTS / "crowd"
    mean, paired = accuracies(study), differences(study)
    reading = ("attention_words", "attention_color", "word_attention", "keyword_color")
    others = ("attention_dpp", "mmr_attention", "scope", "question_dpp")
    others += ("vispruner", "divprune", "cdpruner", "trim")
    rows = re.findall(r"^\| \d+ \((1/\d+)\) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 3
    for ratio, row in rows:
        keep = Fraction(ratio)

        def of(arm: str, keep: Fraction = keep) -> float:
            values = at(mean, (arm,), keep)
            assert values is not None
            return values[0]

        arms = [of("tprl"), of("tprl_lfd"), *map(of, reading), max(map(of, others)), of("random")]
        best = max(reading, key=of)
        expected = arms + (at(paired, ("tprl", best), keep) or [])
        printed = [float(number) for number in re.findall(r"[+-]?\d+\.\d", row)]
        assert printed == pytest.approx(expected, abs=HALF)


def calls_of(name: str, place: Path) -> list[list[str]]:
    """The command lines of a study's script, by an interpreter that only notes them."""
    interpreter, notes = place / ".venv/bin/python", place / "calls"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f"#!/bin/sh\nprintf '%s\\037' \"$@\" >> {notes}\necho >> {notes}\n")
    interpreter.chmod(0o755)
    shutil.copytree(EXPERIMENTS, place / "experiments", ignore=shutil.ignore_patterns("screens"))
    # Nothing is made, so there is nothing to copy.
    copy = place / "bin/cp"
    copy.parent.mkdir()
    copy.write_text("#!/bin/sh\n")
    copy.chmod(0o755)
    environment = os.environ | {"PATH": f"{copy.parent}{os.pathsep}{os.environ['PATH']}"}
    script = place / "experiments" / name / "run.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unbound" not in done.stderr
    lines = notes.read_text().split("\x1f\n")
    return [line.split("\x1f") for line in lines if line]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_of_a_script_composes(name: str, tmp_path: Path) -> None:
    calls: list[Any] = calls_of(name, tmp_path)
    assert calls
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        for first, entry, *words in calls:
            if first != "-m":  # a script of the studies
                assert (ROOT / first).is_file()
                continue
            overrides = [addable(" ".join(word.split())) for word in words if word != "-m"]
            compose(entry.removeprefix("src."), overrides)
