"""Milliseconds of our batched selectors and of the published form, in turns: bench.py ROUNDS CSV
DEVICE."""

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from published import cdpruner, divprune, vispruner
from torch import Tensor
from torch.nn.functional import normalize

from tprl.bench.selectors import synthetic
from tprl.budget import budget
from tprl.build import load_component
from tprl.types import Encoded

BATCH, RATIOS = 8, (1 / 3, 2 / 9, 1 / 9)
# side of the grid, width of the language model, of the tower
GEOMETRIES = {"LLaVA-1.5-7B": (24, 4096, 1024), "tiny_llava": (12, 192, 128)}
NEEDS = ["cls_attention", "clip_relevance", "vision_features"]


def published(name: str, encoded: Encoded, tokens: Tensor, keep: int) -> list[Tensor]:
    extras = encoded.extras
    if name == "divprune":
        return [divprune(image, keep) for image in tokens]
    if name == "cdpruner":
        return [
            cdpruner(image, r, keep)
            for image, r in zip(tokens, extras["clip_relevance"], strict=True)
        ]
    both = zip(extras["vision_features"], extras["cls_attention"], strict=True)
    return [vispruner(image, attention, keep) for image, attention in both]


def products(name: str, encoded: Encoded, tokens: Tensor) -> None:
    """The similarities alone, float32: what neither form can do without (VisPruner's needs them
    once)."""
    for image in encoded.extras["vision_features"] if name == "vispruner" else tokens:
        unit = normalize(image, dim=1)
        unit @ unit.T


def timed(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main(rounds: int, path: Path, device: str) -> None:
    measurement = [
        row for name, sizes in GEOMETRIES.items() for row in compared(name, sizes, rounds, device)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, measurement[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(measurement)
    plot(measurement, path.with_suffix(".svg"))
    print(least(measurement))


def least(rows: Sequence[dict[str, Any]]) -> str:
    """The row in which ours gain least."""
    row = min(rows, key=lambda row: row["ratio_x"])
    where = f"{row['pruner']}, {row['kept_tokens']} of {row['tokens']} tokens"
    return f"least gain: {row['ratio_x']:.1f} times the published form ({where})"


def compared(
    geometry: str, sizes: tuple[int, int, int], rounds: int, device: str
) -> Iterator[dict[str, object]]:
    """A row per pruner and keep ratio."""
    encoded = synthetic(BATCH, NEEDS, *sizes)
    parts = {part.name: getattr(encoded, part.name) for part in fields(encoded)}
    parts = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    encoded = replace(
        encoded, **parts, extras={name: part.to(device) for name, part in encoded.extras.items()}
    )
    tokens = encoded.visual.clone()
    for name in ("divprune", "cdpruner", "vispruner"):
        pruner = load_component("pruner", name)
        for ratio in RATIOS:
            keep = budget(ratio, sizes[0] ** 2)
            turns = []
            for _ in range(rounds + 1):
                ours_seconds = timed(pruner.select, encoded, ratio)
                turns.append(
                    (
                        ours_seconds,
                        timed(published, name, encoded, tokens, keep),
                        timed(products, name, encoded, tokens),
                    )
                )
            kept = pruner.select(encoded, ratio).keep
            both = zip(kept, published(name, encoded, tokens, keep), strict=True)
            same = [float(row[at].float().mean()) for row, at in both]
            ours, published_seconds, least = np.array(turns[1:]).T  # the first round warms up
            row: dict[str, object] = {
                "geometry": geometry,
                "pruner": name,
                "batch_size": BATCH,
                "tokens": sizes[0] ** 2,
            }
            row |= {"kept_tokens": keep, "threads": torch.get_num_threads(), "rounds": rounds}
            for what, values in (
                ("ours_ms", ours),
                ("published_ms", published_seconds),
                ("ratio_x", published_seconds / ours),
            ):
                for suffix, quantile in (("", 0.5), ("_p10", 0.1), ("_p90", 0.9)):
                    row[what.replace("_", f"{suffix}_")] = round(
                        float(np.quantile(values, quantile)), 3
                    )
            row |= {
                "products_alone_ms": round(float(np.median(least)), 3),
                "same_tokens_share": float(np.mean(same)),
            }
            print(row, flush=True)
            yield row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times faster ours are, with the 10 and 90 % quantiles of the rounds."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    middle, low, high = (
        np.array([row[f"ratio{name}_x"] for row in rows]) for name in ("", "_p10", "_p90")
    )
    axes.barh(
        [f"{row['pruner']}, {row['kept_tokens']} of {row['tokens']}" for row in rows],
        middle,
        color="#c2410c",
        alpha=0.7,
    )
    axes.errorbar(
        middle,
        range(len(rows)),
        xerr=[middle - low, high - middle],
        fmt="none",
        ecolor="#1c1917",
        capsize=3,
    )
    axes.axvline(1, color="#6b6760", lw=1)
    axes.invert_yaxis()
    axes.set_xlabel("published form, one image at a time / ours, 8 at once")
    figure.savefig(path, metadata={"Date": None})


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, help="after one that warms up")
    parser.add_argument(
        "path", type=Path, metavar="csv", help="where rows are written; a figure goes beside them"
    )
    parser.add_argument("device", choices=("cpu", "cuda"))
    return parser.parse_args(words)


if __name__ == "__main__":
    main(**vars(options()))
