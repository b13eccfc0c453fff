"""Promised and found: 200 random splits of scored questions into those of a calibration and fresh
ones. No model runs: the scores are those that other studies keep.

    python experiments/retention/splits.py

Splits are of images. On each, the calibration part chooses a setting of every pruner, and the fresh
part says what share of the accuracy with all tokens is left. The share over all images, which the
fresh part measures with noise, says whether the promise was kept.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from tprl.build import load_component
from tprl.errors import UserError
from tprl.evaluation.calibration import calibration_of
from tprl.evaluation.results import FULL
from tprl.evaluation.retention import Trials, retained, smallest
from tprl.evaluation.scores import ScoreTable, read_scores
from tprl.evaluation.statistics import image_key

HERE = Path(__file__).parent
STUDIES = {"scenes": "main_table", "crowd": "crowd"}
PRUNERS = (
    "tprl",
    "tprl_adaptive",
    "attention_dpp",
    "attention_words",
    "attention_words_keyword",
    "scope",
)
TOKENS = {"scenes": 144, "crowd": 256}  # of an image
# World, pruner and weights of the calibrations that ship; the first of a world has fixed ratios.
SHIPPED = (
    ("scenes", "tprl", "tprl_tiny_llava"),
    ("scenes", "tprl_adaptive", "tprl_tiny_llava"),
    ("crowd", "tprl", "tprl_tiny_crowd"),
)
SPLITS, SHARE = 200, 0.7  # of the images for the calibration
PROMISES, CONFIDENCE = (0.99, 0.98, 0.95, 0.9, 0.85), 0.9


class Pool(NamedTuple):
    """A pruner's scores at every setting, from most tokens to fewest, and the tokens it keeps."""

    pruner: str
    seed: int
    trials: Trials
    kept: ndarray  # [K] mean tokens


def pools_of(table: ScoreTable) -> list[Pool]:
    """Every pruner and training seed of a study."""
    keys = [image_key(uid) for uid in table.uids.tolist()]
    _, images = np.unique(keys, return_inverse=True)
    full = table.score[[arm[0] for arm in table.arms].index(FULL)]
    groups: dict[tuple[str, int], list[int]] = {}
    for row, (pruner, seed, _) in enumerate(table.arms):
        if pruner in PRUNERS:
            groups.setdefault((pruner, seed), []).append(row)
    pools = []
    for (pruner, seed), rows in groups.items():
        tokens = table.kept[rows].mean(1)
        order = np.argsort(-tokens)
        scores = table.score[rows][order].T
        pools.append(Pool(pruner, seed, Trials(images, full, scores), tokens[order]))
    return pools


def part(trials: Trials, rows: ndarray) -> Trials:
    """Some of the questions."""
    return trials._replace(
        images=trials.images[rows], full=trials.full[rows], pruned=trials.pruned[rows]
    )


def tokens_at(accuracy: float, fixed: Pool, all_tokens: float) -> float:
    """What a fixed ratio keeps for the same accuracy, between those that were scored."""
    means = np.append(fixed.trials.pruned.mean(0)[::-1], fixed.trials.full.mean())
    best = np.maximum.accumulate(means)  # ascending ratios, none worse than a smaller one
    return float(np.interp(accuracy, best, np.append(fixed.kept[::-1], all_tokens)))


def summary(world: str, pool: Pool, fixed: Pool, all_tokens: float) -> list[dict]:
    """One row per promise, over the splits."""
    trials, images = pool.trials, np.unique(pool.trials.images)
    shares = [retained(trials.full, column) for column in trials.pruned.T]
    rows = []
    for promise in PROMISES:
        splits = []
        for number in range(SPLITS):
            drawn = np.random.default_rng(number).permutation(images)[: round(SHARE * len(images))]
            inside = np.isin(trials.images, drawn)
            try:
                setting = smallest(part(trials, inside), promise, CONFIDENCE).setting
            except UserError as error:
                print(f"{world} {pool.pruner}: {error}")
                break
            if setting is None:
                splits.append((1.0, 1.0, all_tokens, trials.full.mean()))
                continue
            new = part(trials, ~inside)
            fresh = retained(new.full, new.pruned[:, setting])
            accuracy = trials.pruned[:, setting].mean()
            splits.append((shares[setting], fresh, pool.kept[setting], accuracy))
        if len(splits) < SPLITS:
            continue
        left, fresh, tokens, accuracy = np.array(splits).T
        equal = [tokens_at(value, fixed, all_tokens) for value in accuracy]
        rows.append(
            {
                "world": world,
                "pruner": pool.pruner,
                "seed": pool.seed,
                "retention": promise,
                "found": left.mean(),
                "kept_by": np.mean(left >= promise),
                "fresh_found": fresh.mean(),
                "fresh_kept_by": np.mean(fresh >= promise),
                "tokens": tokens.mean(),
                "fixed_tokens": np.mean(equal),
                "all_tokens_by": np.mean(tokens == all_tokens),
            }
        )
    return rows


def main() -> None:
    """Write results.csv, and print it, means over training seeds."""
    table = []
    for world, study in STUDIES.items():
        scores = read_scores(HERE.parent / study / "scores.npz")
        pools, counts = pools_of(scores), scores.kept.max()
        fixed = {pool.seed: pool for pool in pools if pool.pruner == "tprl"}
        for pool in pools:
            table += summary(world, pool, fixed.get(pool.seed, fixed[0]), float(counts))
    # The calibrations that ship: every price of a token is a setting of the adaptive mode.
    fixed_pools: dict[str, Pool] = {}
    for world, name, pretrained in SHIPPED:
        trials, kept = calibration_of(load_component("pruner", name, pretrained=pretrained)).trials
        pool = Pool(f"{name} (ships)", 0, trials, TOKENS[world] * np.array(kept))
        fixed = fixed_pools.setdefault(world, pool)
        table += summary(world, pool, fixed, float(TOKENS[world]))
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0]], lineterminator="\n")
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    for world, pruner, promise in dict.fromkeys(
        (r["world"], r["pruner"], r["retention"]) for r in table
    ):
        same = [
            row
            for row in table
            if (row["world"], row["pruner"], row["retention"]) == (world, pruner, promise)
        ]
        means = {name: np.mean([row[name] for row in same]) for name in [*table[0]][4:]}
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"{world:7} {pruner:14} {promise:<5} {len(same)} seeds  {numbers}")


if __name__ == "__main__":
    main()
