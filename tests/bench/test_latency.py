"""The latency benchmark on small models: what is run, counted and said; never how long it took."""

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands.calls import call, refused
from tests.lvlm.small import each_family
from tests.test_cost import counter

from tprl import cost
from tprl.bench.latency import (
    STAGES,
    Bench,
    Line,
    Reading,
    Setting,
    Spread,
    measure_latency,
    prompts,
    untrained,
)
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.commands.evaluate import evaluate
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.llava import Llava
from tprl.pruners.base import BasePruner
from tprl.report import figures
from tprl.report.latency import sentence

SETTING = Setting(batch_sizes=(1, 3), repeats=2, warmup=1, new_tokens=3, image=(56, 56))
NAMES = ("divprune", "fastv", "tprl", "prumerge", "vispruner")
RATIOS = (0.5, 0.3)


def ticks() -> Any:
    """A clock that shows 1, 2, 3, ... milliseconds."""
    return itertools.count(1.0).__next__


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return Llava(None)


def entries(width: int, *names: str) -> list[Entry]:
    chosen_entries = [Entry("keep_all", load_component("pruner", "keep_all"), (1.0,))]
    for name in names:
        pruner = load_component("pruner", name)
        chosen_entries.append(
            Entry(name, untrained(pruner, width) if name == "tprl" else pruner, RATIOS)
        )
    return chosen_entries


@pytest.fixture(scope="module")
def lines(lvlm: FrozenLVLM) -> list[Line]:
    return measure_latency(lvlm, entries(lvlm.width, *NAMES), SETTING, ticks())


def test_a_line_per_pruner_ratio_and_batch(lines: list[Line]) -> None:
    # FastV runs 1 of these 2 layers on everything, so its mean over layers is above a half.
    result = {(line.pruner, line.keep_ratio, line.batch) for line in lines}
    named = {
        (name, ratio, batch)
        for name in NAMES
        if name != "fastv"
        for ratio in RATIOS
        for batch in (1, 3)
    }
    assert result == named | {("keep_all", 1.0, batch) for batch in (1, 3)}
    assert len(lines) == len(result)
    assert all(len(line.readings) == len(line.full) == SETTING.repeats for line in lines)


def test_stages_are_timed_apart(lines: list[Line]) -> None:
    """The clock moves by 1 whenever it is read: once per stage, and methods that choose nothing
    have no selector."""
    for line in lines:
        selector = 0.0 if line.pruner == "keep_all" else 1.0
        assert set(line.readings) == {Reading(1.0, selector, 1.0, 1.0)}
        assert line.milliseconds("total").median == 3.0 + selector
        assert line.speedup() == Spread(*[3.0 / (3.0 + selector)] * 3)
        assert line.speedup("prefill") == Spread(1.0, 1.0, 1.0)


def test_methods_inside_the_model_have_no_selector(lvlm: FrozenLVLM) -> None:
    setting = Setting(batch_sizes=(2,), repeats=1, warmup=0, new_tokens=3)
    fastv = Entry("fastv", load_component("pruner", "fastv"), (0.75,))
    _, line = measure_latency(lvlm, [*entries(lvlm.width), fastv], setting, ticks())
    assert line.readings == [Reading(1.0, 0.0, 1.0, 1.0)]
    assert line.flops["selector"] == 0
    assert line.kept_tokens == 0.75 * line.visual_tokens == 27
    per_layer = [64 + n + 2 for n in (36, 18)]
    assert line.kv_bytes == 2 * cost.kv_bytes(lvlm.shape.lm, per_layer, 4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "ratio"), [("keep_all", 1.0), ("divprune", 0.3), ("fastv", 0.75), ("tprl", 0.3)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_predicted_flops_are_those_of_the_pass(
    lvlm: FrozenLVLM, name: str, ratio: float, batch: int
) -> None:
    """Nothing timed is left out of the prediction, and the other way round; answers have their full
    length."""
    pruner = load_component("pruner", name)
    if name == "tprl":
        pruner = untrained(load_component("pruner", "tprl"), lvlm.width)
    bench = Bench(lvlm, SETTING, batch, ticks())
    with counter() as fc:
        _, result = bench.run(pruner, ratio)
    assert result["flops"]["total"] == fc.get_total_flops()
    assert result["flops"]["total"] == sum(result["flops"][stage] for stage in STAGES)
    everything = cost.total(lvlm.shape, text_tokens=64, visual_tokens=36, answer_tokens=3)
    assert result["full_flops"]["total"] == batch * everything["total"]
    assert result["full_flops"]["prefill"] == batch * (
        everything["prefill"] + everything["lm_head"] // 3
    )


def test_tokens_that_methods_add_are_counted(lvlm: FrozenLVLM) -> None:
    setting = Setting(batch_sizes=(2,), repeats=1, warmup=0, new_tokens=3)
    trim = Entry("visionzip", load_component("pruner", "visionzip"), (0.5,))
    _, line = measure_latency(lvlm, [*entries(lvlm.width), trim], setting, ticks())
    assert line.kept_tokens == 18
    assert line.kv_bytes == 2 * cost.kv_bytes(lvlm.shape.lm, 64 + 18 + 2, 4)


class Listener(BasePruner):
    """A pruner that notes when it is asked."""

    extras: frozenset[str] = frozenset()

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.inner = name, log, load_component("pruner", "uniform")

    def select(self, encoded: Any, keep_ratio: float | None) -> Any:
        self.log.append(self.name)
        return self.inner.select(encoded, keep_ratio)

    def flops(self, shape: Any, tokens: int, kept: int) -> int:
        return 0


def test_every_round_runs_all_pruners_in_rotated_order(lvlm: FrozenLVLM) -> None:
    heard: list[str] = []
    setting, seen = (
        Setting(batch_sizes=(1,), repeats=2, warmup=1, new_tokens=1),
        list[tuple[int, int]](),
    )
    asked = [*entries(lvlm.width), *(Entry(name, Listener(name, heard), (0.5,)) for name in "ab")]
    measure_latency(lvlm, asked, setting, ticks(), lambda done, total: seen.append((done, total)))
    assert heard == ["a", "b", "a", "b", "b", "a"]
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", each_family())
def test_prompts_have_the_text_that_was_asked_for(name: str) -> None:
    lvlm = load_component("model", name, pretrained=None, dtype="float32")
    for wanted in (150, 151):
        inputs = stock_inputs(lvlm, prompts(lvlm, Setting(text_tokens=wanted, image=(56, 56)), 2))
        text = (inputs["input_ids"] != lvlm.image_token) & inputs["attention_mask"].bool()
        assert text.sum(1).tolist() == [wanted, wanted]


def test_prompts_that_cannot_be_are_refused(lvlm: FrozenLVLM) -> None:
    with pytest.raises(
        UserError, match=r"no prompt of latency.text_tokens=3: its template alone takes \d+"
    ):
        prompts(lvlm, Setting(text_tokens=3), 1)


def line(
    pruner: str, full: list[float], stock: list[float], predicted: int, ratio: float = 1 / 3
) -> Line:
    """Rounds in milliseconds, all of them prefill."""
    readings, reference = (
        [Reading(0.0, 0.0, ms, 0.0) for ms in values] for values in (stock, full)
    )
    flops = {"prefill": 100, "total": 100}
    return Line(
        pruner,
        ratio,
        1,
        576.0,
        192.0,
        1,
        flops,
        dict.fromkeys(flops, predicted),
        readings=readings,
        full=reference,
    )


def test_speedups_compare_rounds_with_themselves() -> None:
    # The machine is three times slower in the second round; both are.
    result = line("a", [30.0, 90.0, 30.0], [20.0, 60.0, 20.0], 200)
    assert result.speedup() == Spread(1.5, 1.5, 1.5)
    assert result.milliseconds("total").median == 20.0
    assert result.predicted() == 2.0
    assert result.share() == 0.75


def test_a_line_joins_the_keep_ratios_of_a_pruner(monkeypatch: pytest.MonkeyPatch) -> None:
    figures_drawn: list[Any] = []
    monkeypatch.setattr(figures, "as_svg", lambda figure, *_: figures_drawn.append(figure) or "")
    figures.speedups(
        [
            line("a", [30.0] * 3, [20.0] * 3, 300, 1 / 9),
            line("a", [30.0] * 3, [25.0] * 3, 200, 1 / 3),
            line("b", [30.0] * 3, [20.0] * 3, 300, 1 / 9),
        ]
    )
    (drawn,) = figures_drawn
    joined = {plot.get_label(): plot for plot in drawn.axes[1].lines}
    x, y = joined["a"].get_data()
    assert list(x) == sorted(x)
    assert sorted(y) == [1.2, 1.5]
    assert joined["a"].get_linestyle() != "None"
    assert len(joined["b"].get_xdata()) == 1
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b"]


def test_spreads_are_quantiles() -> None:
    assert Spread.of([float(n) for n in range(1, 12)]) == Spread(6.0, 2.0, 10.0)


def test_a_sentence_says_faster_slower_or_neither() -> None:
    faster = line("a", [30.0] * 3, [20.0] * 3, 200)
    slower = line("a", [30.0] * 3, [40.0] * 3, 200, 1 / 9)
    unclear = line("a", [30.0] * 3, [20.0, 30.0, 40.0], 200)
    assert sentence([faster]) == (
        "a is faster than not pruning: 1.50x from pixels to the last token where "
        "its FLOPs predict 2.00x, 75 % of the ideal; the prefill alone 1.50x, 75 %."
    )
    assert sentence([slower]) == (
        "a is slower than not pruning: 0.75x from pixels to the last token "
        "where its FLOPs predict 2.00x; the prefill alone 0.75x, 38 %."
    )
    assert sentence([faster, slower, unclear]) == (
        "a is faster than not pruning in 1 of 3 settings and slower in 1: "
        "0.75-1.50x from pixels to the last token where its FLOPs predict "
        "2.00x, 38-75 % of the ideal; the prefill alone 0.75-1.50x, 38-75 %."
    )


def test_the_command_writes_a_table_a_plot_and_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["batch_sizes=[1,2]", "repeats=1", "warmup=0", "new_tokens=2"]
    words = [
        "mode=latency",
        "logger=none",
        "model=llava",
        "model.pretrained=null",
        "model.dtype=float32",
    ]
    words += [
        "keep_ratios=[0.5]",
        "pruner=tprl",
        "pruners=[divprune]",
        *(f"latency.{word}" for word in options),
    ]
    run = call("eval", evaluate, tmp_path / "run", *words)
    with (run / "latency.csv").open() as file:
        result = list(csv.DictReader(file))
    assert [(row["pruner"], row["batch_size"]) for row in result] == [
        (name, batch) for batch in "12" for name in ("tprl", "keep_all", "divprune")
    ]
    assert all(
        float(row["text_tokens"]) == 64 and float(row["visual_tokens"]) == 36 for row in result
    )
    row = result[-1]
    shape = Llava(None).shape
    assert float(row["kv_cache_bytes"]) == 2 * cost.kv_bytes(shape.lm, 64 + 18 + 1, 4)
    expected = {
        kept: cost.prefill_flops(shape, 64, kept) + cost.lm_head_flops(shape) for kept in (36, 18)
    }
    assert float(row["prefill_gflops"]) == pytest.approx(2 * expected[18] / 1e9)
    assert float(row["prefill_predicted_speedup_x"]) == pytest.approx(expected[36] / expected[18])
    assert row["peak_device_memory_bytes"] == ""
    times = [float(row[f"{stage}_ms"]) for stage in STAGES]
    assert float(row["total_ms"]) == pytest.approx(sum(times))
    svg = (run / "speedup.svg").read_text()
    assert all(name in svg for name in ("divprune", "tprl", "measured speed-up"))
    sentences = (run / "latency.md").read_text().splitlines()
    assert [word.split(" is ")[0] for word in sentences] == ["- divprune", "- tprl"]
    out = capsys.readouterr().out
    assert "peak memory: measured on CUDA devices only." in out
    assert "FLOPs: 2 per multiply-accumulate" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["pruners=[random]", "model=toy"],
            "model=toy has no vision tower and language model to time",
        ),
        (
            ["pruners=[random]", "latency.repeats=0"],
            "latency.repeats must be a whole number of at least 1, got 0; use e.g. 8.",
        ),
        (
            ["pruners=[random]", "latency.batch_sizes=[]"],
            "latency.batch_sizes=[] leaves nothing to time: name at least 1.",
        ),
        ([], "nothing to evaluate: give run="),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], sentence: str
) -> None:
    assert sentence in refused(
        capsys, "eval", tmp_path / "run", "mode=latency", "logger=none", *words
    )
