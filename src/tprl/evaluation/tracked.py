"""The rows of an evaluation in Weights & Biases."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from tprl.evaluation.results import COLUMNS, FULL, Row
from tprl.runtime.tracking import RATIO, Tracker


def log_results(logger: object, rows: Sequence[Row]) -> None:
    """Put an evaluation's rows beside the curves of its training: every metric, `flops_ratio` and
    `kept_tokens` of every pruner over `keep_ratio`, and the table `eval/results`. Other loggers
    than W&B get nothing: `results.csv` holds the same. A pruner that decides alone stands at the
    fraction that it kept."""
    if not isinstance(logger, Tracker):
        return
    import wandb

    # A pruner that decides alone has no ratio: its kept tokens over all tokens are one.
    visual = next((row.kept_tokens for row in rows if row.pruner == FULL), None)
    points: dict[tuple[str, int, float], dict[str, float]] = defaultdict(dict)
    for row in rows:
        name = f"eval/{row.pruner}" + (f"/seed{row.seed}" if row.seed else "")
        ratio = row.keep_ratio
        if ratio is None and visual:
            ratio = row.kept_tokens / visual
        if ratio is not None:
            values = {
                row.metric: row.value,
                "flops_ratio": row.flops_ratio,
                "kept_tokens": row.kept_tokens,
            }
            points[row.pruner, row.seed, ratio] |= {
                f"{name}/{key}": value for key, value in values.items()
            }
    # W&B draws points in the order in which they come.
    for (_, _, ratio), point in sorted(points.items()):
        logger.log_row({RATIO: ratio, **point}, axis=RATIO)
    table: list[Any] = [list(astuple(row)) for row in rows]
    logger.log_row({"eval/results": wandb.Table(columns=list(COLUMNS), data=table)}, axis=RATIO)
