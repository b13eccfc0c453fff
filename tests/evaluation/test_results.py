"""Files read back as written, written whole or not at all; the table says what the rows say."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tprl.cost import CONVENTION
from tprl.errors import UserError
from tprl.evaluation import results
from tprl.evaluation.results import Row, SampleRow

FULL = Row(
    "tiny_llava", "scenes", "keep_all", 0, 1.0, 144.0, "accuracy", 0.953, 0.94, 0.966, 2.5e9, 1.0
)
RANDOM = replace(
    FULL, pruner="random", keep_ratio=1 / 9, kept_tokens=16.0, value=0.7, ci_low=0.67, ci_high=0.73
)
ROWS = [
    FULL,
    replace(RANDOM, flops_ratio=0.25),
    replace(RANDOM, seed=1, value=0.6, flops_ratio=0.25),
    replace(RANDOM, pruner="tprl", value=0.8125, ci_low=0.79, ci_high=0.83, flops_ratio=0.31),
    replace(RANDOM, pruner="tprl", keep_ratio=1 / 3, kept_tokens=48.0, value=0.9, flops_ratio=0.5),
    replace(RANDOM, pruner="tprl_threshold", keep_ratio=None, kept_tokens=21.5, value=0.85),
    replace(
        RANDOM,
        pruner="tprl",
        metric="accuracy/count, hard",
        value=0.1,
        ci_low=math.nan,
        ci_high=math.nan,
    ),
]


def test_csv_reads_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.csv"
    results.write_results(path, ROWS)
    assert results.read_results(path)[:-1] == ROWS[:-1]
    assert repr(results.read_results(path)[-1]) == repr(ROWS[-1])  # nan != nan
    header = (
        "model,dataset,pruner,seed,keep_ratio,kept_tokens,"
        "metric,value,ci_low,ci_high,flops,flops_ratio"
    )
    lines = path.read_text().splitlines()
    assert lines[0] == header
    assert (
        lines[1]
        == "tiny_llava,scenes,keep_all,0,1.0,144.0,accuracy,0.953,0.94,0.966,2500000000.0,1.0"
    )
    assert len(lines) == 8


def test_samples_read_back(tmp_path: Path) -> None:
    samples = [
        SampleRow("scenes/test/1/0", "count", "tprl", 0, 0.333, 'deux "é"\n', 1.0, 48),
        SampleRow("scenes/test/1/1", "", "tprl_threshold", 0, None, None, 0.5, 7),
    ]
    results.write_samples(tmp_path / "samples.jsonl", samples)
    assert results.read_samples(tmp_path / "samples.jsonl") == samples
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    results.write_results(path, ROWS[:1])

    def full_disk(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        results.write_results(path, ROWS)
    assert results.read_results(path) == ROWS[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".sums", "results.csv"]


def test_an_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^Cannot write .*results\.csv .*writable folder.*\.$"):
        results.write_results(tmp_path / "file" / "results.csv", ROWS)


def test_grid_averages_seeds() -> None:
    cells = results.grid(ROWS)
    assert cells["random"][1 / 9].value == pytest.approx(0.65)
    assert cells["random"][1 / 9].seeds == 2
    assert results.ratios(cells) == [1.0, 1 / 3, 1 / 9, None]
    assert results.pruner_order(cells) == ["keep_all", "tprl", "random", "tprl_threshold"]
    assert results.grid(ROWS, "accuracy/count, hard")["tprl"][1 / 9].value == 0.1

    with pytest.raises(ValueError, match="one model on one dataset"):
        results.grid([FULL, replace(FULL, model="other")])


def printed(**options: object) -> str:
    out = io.StringIO()
    results.print_table(ROWS, Console(file=out, **options))  # type: ignore[arg-type]
    return out.getvalue()


def test_plain_table_when_piped() -> None:
    text = printed()
    assert text.isascii()
    assert "\x1b" not in text
    table, convention = text.split("FLOPs: ")
    assert " ".join(("FLOPs: " + convention).split()) == CONVENTION
    lines = [" ".join(line.split()) for line in table.splitlines() if "|" in line]
    assert any("keep_all (all tokens) | 95.3 [94.0, 96.6]" in line for line in lines)
    assert any(
        line.startswith("| tprl | | 90.0 [67.0, 73.0] | 81.2 [79.0, 83.0] |") for line in lines
    )
    assert any("| 144 tokens | 48 tokens | 16 tokens | 22 tokens |" in line for line in lines)
    assert any("FLOPs x 0.25-0.31" in line for line in lines)


def test_rich_table_on_a_terminal() -> None:
    text = printed(force_terminal=True, width=140, color_system="standard")
    assert "\x1b[1m81.2" in text  # the best of its column is bold
    assert "\x1b[1m95.3" not in text
    assert "╭" in text


@pytest.mark.parametrize("width", [45, 80])
def test_a_narrow_terminal_gets_the_table_in_parts(width: int) -> None:
    lines = printed(force_terminal=True, width=width, color_system=None).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("╭") for line in lines) > 1
    assert "…" not in "".join(lines)
    heads = [
        text
        for line in lines
        for text in ("100 %", "33.3 %", "11.1 %", "own choice")
        if text in line
    ]
    assert heads == ["100 %", "33.3 %", "11.1 %", "own choice"]
