"""What mode=latency leaves behind: `latency.csv`, `speedup.svg`, a table and a sentence per
pruner."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tprl.bench.latency import STAGES, Line, Setting, Spread
from tprl.cost import CONVENTION
from tprl.evaluation.results import FULL, ratio_label, span, write_atomic
from tprl.lvlm.frozen import FrozenLVLM
from tprl.report.figures import speedups, standalone


def write_latency(
    lines: Sequence[Line], lvlm: FrozenLVLM, setting: Setting, directory: Path
) -> None:
    """Write the files, print table and sentences."""
    # The csv holds every number; the sentences are what a reader may quote.
    records = latency_rows(lines, lvlm, setting)
    out = io.StringIO()
    writer = csv.DictWriter(out, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomic(directory / "latency.csv", out.getvalue())
    names = sorted({line.pruner for line in lines})
    sentences = []
    for name in names:
        if name != FULL:
            sentences.append(sentence([line for line in lines if line.pruner == name]))
    write_atomic(directory / "latency.md", "".join(f"- {text}\n" for text in sentences))
    # The reference has a speed-up of 1 by definition, so the plot leaves it out.
    pruned = [line for line in lines if line.pruner != FULL]
    if pruned:
        write_atomic(directory / "speedup.svg", standalone(speedups(pruned), names))
    # A file has no width to respect, and a wrapped table could not be read by a program.
    console = Console()
    if not console.is_terminal:
        console = Console(
            file=console.file, width=240, color_system=None, highlight=False, emoji=False
        )
    console.print(latency_table(lines, plain=not console.is_terminal))
    for text in (*sentences, _memory(lines), CONVENTION):
        print(text)


def latency_rows(lines: Sequence[Line], lvlm: FrozenLVLM, setting: Setting) -> list[dict[str, Any]]:
    """A row per pruner, keep ratio and batch size; units are in the names, `p10` and `p90` are
    quantiles over the rounds. FLOPs and bytes are the batch's."""
    device = (
        torch.cuda.get_device_name(lvlm.device) if lvlm.device.type == "cuda" else lvlm.device.type
    )
    # Conditions of the measurement stand in every row, so that tables of machines can be joined.
    about = {
        "model": lvlm.name,
        "lm_layers": lvlm.layers,
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": str(lvlm.model.dtype).removeprefix("torch."),
        "text_tokens": setting.text_tokens,
        "new_tokens": setting.new_tokens,
    }
    return [about | _latency_row(line) for line in lines]


def _latency_row(line: Line) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rounds": len(line.readings),
        "pruner": line.pruner,
        "keep_ratio": line.keep_ratio,
        "batch_size": line.batch,
        "visual_tokens": line.visual_tokens,
        "kept_tokens_layer_mean": line.kept_tokens,
    }
    # Times first, then what predicts them: stages add up to the total.
    for stage in (*STAGES, "total"):
        row |= _times(line, stage)
    row |= {f"{stage}_gflops": line.flops[stage] / 1e9 for stage in (*STAGES, "total")}
    for stage in ("prefill", "total"):
        row |= _speedup(line, stage)
    return row | {"kv_cache_bytes": line.kv_bytes, "peak_device_memory_bytes": line.peak}


def _times(line: Line, stage: str) -> dict[str, float]:
    median, low, high = line.milliseconds(stage)
    return {f"{stage}_ms": median, f"{stage}_p10_ms": low, f"{stage}_p90_ms": high}


def _speedup(line: Line, stage: str) -> dict[str, float]:
    median, low, high = line.speedup(stage)
    columns = {"speedup_x": median, "speedup_p10_x": low, "speedup_p90_x": high}
    columns |= {
        "predicted_speedup_x": line.predicted(stage),
        "share_of_predicted": line.share(stage),
    }
    return {f"{stage}_{name}": value for name, value in columns.items()}


def latency_table(lines: Sequence[Line], plain: bool = False) -> Table:
    """Milliseconds of the stages, and speed-ups with their quantiles."""
    grid = Table(title="latency", box=box.ASCII2 if plain else box.ROUNDED, title_justify="left")
    for heading in ("pruner", "batch", "kept", *(f"{stage}\nms" for stage in (*STAGES, "total"))):
        grid.add_column(heading, justify="left" if heading == "pruner" else "right", no_wrap=True)
    # Each measured speed-up stands beside the speed-up that its FLOPs predict.
    for heading in (
        "prefill\nspeed-up",
        "its FLOPs\nsay",
        "total\nspeed-up",
        "its FLOPs\nsay",
        "KV cache\nMiB",
    ):
        grid.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        cells = [f"{line.milliseconds(stage).median:.1f}" for stage in (*STAGES, "total")]
        for stage in ("prefill", "total"):
            cells += [_range(line.speedup(stage)), f"{line.predicted(stage):.2f}x"]
        kept = f"{ratio_label(line.keep_ratio)}, {line.kept_tokens:.0f} tokens"
        grid.add_row(line.pruner, str(line.batch), kept, *cells, f"{line.kv_bytes / 2**20:.1f}")
    return grid


def _range(of: Spread) -> str:
    return f"{of.median:.2f}x [{of.low:.2f}, {of.high:.2f}]"


def sentence(lines: Sequence[Line]) -> str:
    """Whether a pruner is faster than not pruning, at which it counts only beyond the quantiles of
    the rounds, and its share of the speed-up that FLOPs predict."""
    # Faster or slower only if the 10 and 90 % quantiles of the rounds agree.
    speedups = [line.speedup() for line in lines]
    faster = sum(speedup.low > 1 for speedup in speedups)
    slower = sum(speedup.high < 1 for speedup in speedups)
    if faster == len(lines):
        verdict = "is faster than not pruning"
    elif slower == len(lines):
        verdict = "is slower than not pruning"
    else:
        verdict = (
            f"is faster than not pruning in {faster} of "
            f"{len(lines)} settings and slower in {slower}"
        )
    text = (
        f"{lines[0].pruner} {verdict}: {span([speedup.median for speedup in speedups], '.2f')}x "
        "from pixels to the last token"
    )
    text += f" where its FLOPs predict {span([line.predicted() for line in lines], '.2f')}x"
    # A share of the ideal means nothing for a pruner that is always slower.
    if slower < len(lines):
        text += f", {span([100 * line.share() for line in lines], '.0f')} % of the ideal"
    # The prefill alone shows what pruning can reach; decoding and vision dilute it in the total.
    alone = span([line.speedup("prefill").median for line in lines], ".2f")
    return (
        f"{text}; the prefill alone {alone}x, "
        f"{span([100 * line.share('prefill') for line in lines], '.0f')} %."
    )


def _memory(lines: Sequence[Line]) -> str:
    peaks = [line.peak / 2**30 for line in lines if line.peak is not None]
    if not peaks:
        return "peak memory: measured on CUDA devices only."
    return f"peak memory of the device: {span(peaks, '.2f')} GiB, weights included."
