"""`python -m src.eval mode=turns`."""

import csv
import json
from pathlib import Path

import pytest
from tests.commands.calls import call, refused

from tprl.commands.evaluate import evaluate

TOY = ("mode=turns", "model=toy", "dataset=toy", "logger=none", "keep_ratios=[0.25]")


def test_a_table_of_every_arm_and_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pruner=cls_attention", "limit=36", "turns.lengths=[2,3]", "turns.equal=[read]")
    run = call("eval", evaluate, tmp_path, *TOY, *words)
    with (run / "turns.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["arm"], row["turns"], row["turn"]) for row in rows} == {
        (arm, str(turns), str(turn))
        for arm, turns in (("keep_all", 2), ("cls_attention", 2), ("keep_all", 3))
        for turn in range(turns + 1)
    } | {("cls_attention", "3", str(turn)) for turn in range(4)}
    whole = next(row for row in rows if (row["arm"], row["turns"]) == ("cls_attention", "3"))
    # 6 of 24 tokens, computed once and cached twice; the toy world marks its objects by attention.
    assert (whole["read"], whole["computed"], whole["cached"]) == ("18", "6", "12")
    assert (whole["accuracy"], whole["images"]) == ("1", "6")
    # What is averaged there stands question by question beside it.
    answers = [json.loads(line) for line in (run / "turns.jsonl").read_text().splitlines()]
    talk = [row for row in answers if (row["arm"], row["turns"]) == ("cls_attention", 3)]
    assert len(talk) == 18
    assert {row["number"] for row in talk} == {1, 2, 3}
    assert sum(row["read"] for row in talk) == 6 * float(whole["read"])
    assert sum(row["cached"] for row in talk) == 6 * float(whole["cached"])
    table = capsys.readouterr().out
    assert (
        "3 questions, keep_ratio 0.25: every turn reads as many visual tokens (6 images)" in table
    )
    assert (run / "turns.md").read_text() in table


def test_too_few_questions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pruner=cls_attention", "limit=12", "turns.lengths=[9]")
    line = refused(capsys, "eval", tmp_path, *TOY, *words)
    assert line == (
        "error: turns.lengths=9 needs an image with as many questions, and those of toy have at "
        "most 6: use turns.lengths=[6]."
    )
