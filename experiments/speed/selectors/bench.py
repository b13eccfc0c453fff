"""Milliseconds of our batched selectors and of the published form, in turns: bench.py ROUNDS CSV DEVICE."""

import csv
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import torch
from matplotlib.figure import Figure
from published import cdpruner, divprune, vispruner
from torch import Tensor
from torch.nn.functional import normalize

from tprl.build import load_component
from tprl.evaluation.selectors import synthetic
from tprl.types import Encoded

BATCH, KEEP = 8, (192, 128, 64)
NEEDS = ["cls_attention", "clip_relevance", "vision_features"]


def published(name: str, encoded: Encoded, tokens: Tensor, keep: int) -> list[Tensor]:
    extras = encoded.extras
    if name == "divprune":
        return [divprune(one, keep) for one in tokens]
    if name == "cdpruner":
        return [cdpruner(one, r, keep) for one, r in zip(tokens, extras["clip_relevance"], strict=True)]
    both = zip(extras["vision_features"], extras["cls_attention"], strict=True)
    return [vispruner(one, attention, keep) for one, attention in both]


def products(name: str, encoded: Encoded, tokens: Tensor) -> None:
    """The similarities alone, float32: what neither form can do without (VisPruner's needs them once)."""
    for one in encoded.extras["vision_features"] if name == "vispruner" else tokens:
        unit = normalize(one, dim=1)
        unit @ unit.T


def timed(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main(rounds: int, path: str, device: str) -> None:
    encoded = synthetic(BATCH, NEEDS)
    parts = {part.name: getattr(encoded, part.name) for part in fields(encoded)}
    parts = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    encoded = replace(encoded, **parts, extras={name: part.to(device) for name, part in encoded.extras.items()})
    tokens = encoded.visual.clone()
    columns = ["pruner", "batch_size", "tokens", "kept_tokens", "threads", "rounds", "ours_ms", "ours_p10_ms"]
    columns += ["ours_p90_ms", "published_ms", "published_p10_ms", "published_p90_ms", "products_alone_ms", "ratio_x"]
    columns += ["ratio_p10_x", "ratio_p90_x", "same_tokens_share"]
    found = []
    for name in ("divprune", "cdpruner", "vispruner"):
        pruner = load_component("pruner", name)
        for keep in KEEP:
            ours, theirs, least = [], [], []
            for turn in range(rounds + 1):
                mine = timed(pruner.select, encoded, keep / 576)
                other = timed(published, name, encoded, tokens, keep)
                product = timed(products, name, encoded, tokens)
                if turn:  # the first warms up
                    ours.append(mine), theirs.append(other), least.append(product)
            kept = pruner.select(encoded, keep / 576).keep
            both = zip(kept, published(name, encoded, tokens, keep), strict=True)
            same = [float(row[at].float().mean()) for row, at in both]
            quantiles = [np.quantile(x, (0.5, 0.1, 0.9)) for x in (ours, theirs, np.array(theirs) / np.array(ours))]
            cells = [*quantiles[0], *quantiles[1], np.median(least), *quantiles[2], np.mean(same)]
            found.append([name, BATCH, 576, keep, torch.get_num_threads(), rounds, *(f"{x:.3f}" for x in cells)])
            print(dict(zip(columns, found[-1], strict=True)), flush=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *found])
    plot([dict(zip(columns, row, strict=True)) for row in found], path.replace(".csv", ".svg"))


def plot(rows: list[dict[str, str]], path: str) -> None:
    """How many times faster ours are, with the 10 and 90 % quantiles of the rounds."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    middle, low, high = (np.array([float(row[f"ratio_{name}x"]) for row in rows]) for name in ("", "p10_", "p90_"))
    axes.barh([f"{row['pruner']}, {row['kept_tokens']} of 576" for row in rows], middle, color="#c2410c", alpha=0.7)
    axes.errorbar(middle, range(len(rows)), xerr=[middle - low, high - middle], fmt="none", ecolor="#1c1917", capsize=3)
    axes.axvline(1, color="#6b6760", lw=1)
    axes.invert_yaxis()
    axes.set_xlabel("published form, one image at a time / ours, 8 at once")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
