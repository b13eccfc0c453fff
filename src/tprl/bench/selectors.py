"""What every pruner needs, keeps and costs in time: the table of docs/baselines.md."""

import inspect
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tprl.build import choices, target_of
from tprl.evaluation.results import FULL
from tprl.lvlm.layer_drop import LayerPruner
from tprl.pruners.base import named_pruner
from tprl.types import Encoded

SIDE, WIDTH, VISION, KEY, PATCH = 24, 4096, 1024, 64, 14  # LLaVA-1.5-7B: 576 tokens
Times = dict[tuple[str, int], list[float]]  # (pruner, batch size) -> milliseconds of every turn


class Selector(NamedTuple):
    """A line of the table; milliseconds are (median, lowest, highest) for each batch size, or why
    there are none."""

    name: str
    needs: str
    exact: str
    milliseconds: tuple[tuple[float, float, float], ...] | str
    evidence: str


def synthetic(
    batch: int, extras: Sequence[str], side: int = SIDE, width: int = WIDTH, vision: int = VISION
) -> Encoded:
    """Random prompts with 32 words each, of LLaVA-1.5-7B's geometry where no other is given."""
    draw, n = torch.Generator().manual_seed(0), side * side
    # Attention sums to 1 over tokens, other extras are of any size.
    attentions = (
        "cls_attention",
        "last_cls_attention",
        "middle_attention",
        "last_attention",
        "word_attention",
    )
    sizes = {
        "vision_features": vision,
        "cls_feature": vision,
        "vision_keys": KEY,
        "last_keys": vision,
    }
    tensors = {name: torch.randn(batch, n, generator=draw).softmax(1) for name in attentions}
    tensors |= {name: torch.randn(batch, n, size, generator=draw) for name, size in sizes.items()}
    tensors |= {name: torch.rand(batch, n, generator=draw) for name in ("clip_relevance", "region")}
    for name in ("pixels", "rgb"):
        tensors[name] = torch.rand(batch, n, 3, PATCH, PATCH, generator=draw)
    # BOS, the image's tokens, 32 words.
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
        extras={name: tensors[name] for name in extras},
        project=lambda features: features @ projector,
        questions=("what is left of the red bus?",) * batch,
    )


@torch.no_grad()
def measure_selectors(batches: Sequence[int] = (1, 8), repeats: int = 5) -> list[Selector]:
    """Every training-free pruner of conf/pruner, timed in turns on this machine at a ninth of the
    tokens, except those whose work is the model's own."""
    pruners = [
        named_pruner(name)
        for name in choices("pruner")
        if inspect.isclass(target_of("pruner", name))
    ]
    # Three kinds: those that choose before the language model are timed, the others described.
    inside = [pruner for pruner in pruners if isinstance(pruner, LayerPruner)]
    towers = [pruner for pruner in pruners if _runs_tower(pruner)]
    before = [
        pruner
        for pruner in pruners
        if pruner not in inside and pruner not in towers and pruner.name != FULL
    ]
    times, exact = _timed(before, batches, repeats)
    lines = [
        Selector(
            pruner.name,
            _needs(pruner),
            "yes" if exact[pruner.name] else "no",
            _spread(times, pruner.name, batches),
            _test(pruner),
        )
        for pruner in before
    ]
    for pruner in towers:
        budget = "at most" if pruner.shows_smaller_images else "yes"
        lines.append(
            Selector(pruner.name, _needs(pruner), budget, "runs the tower again", _test(pruner))
        )
    return lines + [
        Selector(pruner.name, "one layer's q, k", "mean over layers", "in the model", _test(pruner))
        for pruner in inside
    ]


def _timed(
    pruners: Sequence[Any], batches: Sequence[int], repeats: int
) -> tuple[Times, dict[str, bool]]:
    """Milliseconds of every turn, and which pruners kept exactly the budget in all of them."""
    times: Times = defaultdict(list)
    exact = dict.fromkeys((pruner.name for pruner in pruners), True)
    extras = sorted(frozenset().union(*(pruner.extras for pruner in pruners)))
    for b in batches:
        encoded = synthetic(b, extras)
        # In turns, so that what disturbs the machine disturbs all alike.
        for turn in range(repeats + 1):  # the first warms up
            for pruner in pruners:
                start = time.perf_counter()
                count = pruner.select(encoded, 1 / 9).count
                if turn:
                    times[pruner.name, b].append(1e3 * (time.perf_counter() - start))
                exact[pruner.name] &= count.tolist() == [SIDE * SIDE // 9] * b
    return times, exact


def _runs_tower(pruner: Any) -> bool:
    """Whether it merges inside the tower, or shows it another image."""
    return "patch_embeds" in pruner.extras or pruner.shows_smaller_images


def _needs(pruner: Any) -> str:
    words = "the question" if pruner.reads_question else ""
    return ", ".join(filter(None, [*sorted(pruner.extras), words])) or "-"


def _spread(
    times: Times, name: str, batches: Sequence[int]
) -> tuple[tuple[float, float, float], ...]:
    turns = [times[name, b] for b in batches]
    return tuple((float(np.median(t)), min(t), max(t)) for t in turns)


def _test(pruner: Any) -> str:
    """The test file of this checkout that compares it with plain loops or another library."""
    folder = Path(__file__).resolve().parents[3] / "tests" / "pruners"
    file = f"test_{type(pruner).__module__.rpartition('.')[2]}.py"
    name = file if (folder / file).is_file() else "test_layer_pruners.py"
    return f"`tests/pruners/{name}`" if (folder / name).is_file() else ""


def selector_table(lines: Sequence[Selector]) -> str:
    """Markdown."""
    out = [
        (
            "| pruner | needs beside projected tokens | exact "
            "budget | ms, B = 1 | ms, B = 8 | compared in |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        if isinstance(line.milliseconds, str):
            cells = [line.milliseconds] * 2
        else:
            cells = [
                f"{middle:.1f} [{low:.1f}, {high:.1f}]" for middle, low, high in line.milliseconds
            ]
        out.append(
            f"| `{line.name}` | {line.needs} | {line.exact} "
            f"| {' | '.join(cells)} | {line.evidence} |"
        )
    return "\n".join(out)
