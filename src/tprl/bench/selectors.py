"""What every pruner needs, keeps and costs in time: the table of docs/baselines.md."""

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tprl.build import choices, load_component, target_of
from tprl.evaluation.results import FULL
from tprl.lvlm.layer_drop import LayerPruner
from tprl.types import Encoded

SIDE, WIDTH, VISION, KEY = 24, 4096, 1024, 64  # LLaVA-1.5-7B: 576 tokens


class Selector(NamedTuple):
    """A line of the table; milliseconds are (median, lowest, highest) for each batch size, or why there are none."""

    name: str
    needs: str
    exact: str
    milliseconds: tuple[tuple[float, float, float], ...] | str
    evidence: str


def synthetic(batch: int, extras: Sequence[str], side: int = SIDE, width: int = WIDTH, vision: int = VISION) -> Encoded:
    """Random prompts with 32 words each, of LLaVA-1.5-7B's geometry where no other is given."""
    draw, n = torch.Generator().manual_seed(0), side * side
    attentions = ("cls_attention", "last_cls_attention", "middle_attention", "last_attention")
    sizes = {"vision_features": vision, "cls_feature": vision, "vision_keys": KEY, "last_keys": vision}
    found = {name: torch.randn(batch, n, generator=draw).softmax(1) for name in attentions}
    found |= {name: torch.randn(batch, n, size, generator=draw) for name, size in sizes.items()}
    found |= {name: torch.rand(batch, n, generator=draw) for name in ("clip_relevance", "region")}
    columns = torch.arange(n + 33)
    projector = torch.randn(vision, width, generator=draw) / vision**0.5
    return Encoded(
        uids=tuple(map(str, range(batch))),
        input_ids=torch.ones(batch, n + 33, dtype=torch.long),
        embeds=torch.randn(batch, n + 33, width, generator=draw),
        attention=torch.ones(batch, n + 33, dtype=torch.bool),
        positions=columns.expand(1, batch, -1),
        visual_at=columns[1 : n + 1].expand(batch, -1),
        visual_mask=torch.ones(batch, n, dtype=torch.bool),
        image_of=torch.zeros(batch, n, dtype=torch.long),
        grids=((((side, side),),),) * batch,
        question=(columns > n).expand(batch, -1),
        extras={name: found[name] for name in extras},
        project=lambda features: features @ projector,
    )


@torch.no_grad()
def measure(batches: Sequence[int] = (1, 8), repeats: int = 5) -> list[Selector]:
    """Every training-free pruner of conf/pruner, timed in turns on this machine at a ninth of the tokens, except those
    whose work is the model's own."""
    made = [load_component("pruner", name) for name in choices("pruner") if inspect.isclass(target_of("pruner", name))]
    inside = [one for one in made if isinstance(one, LayerPruner)]
    towers = [one for one in made if "patch_embeds" in one.extras]
    before = [one for one in made if one not in inside and one not in towers and one.name != FULL]
    times: dict[tuple[str, int], list[float]] = {(one.name, b): [] for one in before for b in batches}
    exact = dict.fromkeys((one.name for one in before), True)
    for b in batches:
        encoded = synthetic(b, sorted(frozenset().union(*(one.extras for one in before))))
        for turn in range(repeats + 1):  # the first warms up
            for one in before:
                start = time.perf_counter()
                count = one.select(encoded, 1 / 9).count
                if turn:
                    times[one.name, b].append(1e3 * (time.perf_counter() - start))
                exact[one.name] &= count.tolist() == [SIDE * SIDE // 9] * b
    lines = [
        Selector(
            one.name, _needs(one), "yes" if exact[one.name] else "no", _spread(times, one.name, batches), _test(one)
        )
        for one in before
    ]
    lines += [Selector(one.name, _needs(one), "yes", "runs the tower again", _test(one)) for one in towers]
    return lines + [
        Selector(one.name, "one layer's q, k", "mean over layers", "in the model", _test(one)) for one in inside
    ]


def _needs(pruner: Any) -> str:
    words = "the question" if getattr(pruner, "reads_question", False) else ""
    return ", ".join(filter(None, [*sorted(pruner.extras), words])) or "-"


def _spread(
    times: dict[tuple[str, int], list[float]], name: str, batches: Sequence[int]
) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(np.median(t)), min(t), max(t)) for t in (times[name, b] for b in batches))


def _test(pruner: Any) -> str:
    """The test file of this checkout that compares it with plain loops or another library."""
    folder = Path(__file__).resolve().parents[3] / "tests" / "pruners"
    own = f"test_{type(pruner).__module__.rpartition('.')[2]}.py"
    name = own if (folder / own).is_file() else "test_layer_pruners.py"
    return f"`tests/pruners/{name}`" if (folder / name).is_file() else ""


def table(lines: Sequence[Selector]) -> str:
    """Markdown."""
    out = [
        "| pruner | needs beside projected tokens | exact budget | ms, B = 1 | ms, B = 8 | compared in |",
        "|---|---|---|---|---|---|",
    ]
    for one in lines:
        if isinstance(one.milliseconds, str):
            cells = [one.milliseconds] * 2
        else:
            cells = [f"{middle:.1f} [{low:.1f}, {high:.1f}]" for middle, low, high in one.milliseconds]
        out.append(f"| `{one.name}` | {one.needs} | {one.exact} | {' | '.join(cells)} | {one.evidence} |")
    return "\n".join(out)
