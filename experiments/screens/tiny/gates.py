"""python -m experiments.screens.tiny.gates <model or run folder> [--split val] [--limit 600]: may
it ship?

Prints accuracy in percent of pointing (the center of the box is in the true box) and reading: with
all visual tokens, with random ones, with those of the oracle, and with those of the oracle of the
next question about the same page.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tprl.data.screens import POINTING, Screens
from tprl.data.taking import take
from tprl.errors import UserError
from tprl.evaluation.statistics import image_key
from tprl.lvlm.llava import Llava
from tprl.pruners.oracle import OraclePruner
from tprl.pruners.random import RandomPruner
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Sample, TokenSelection

FULL, LOST, GUIDED = 85, 25, 20  # percent and points that are asked for
RANDOM, NARROW = 1 / 9, 1 / 18  # keep ratios
BATCH = 16
Select = Callable[[Encoded, Sequence[Sample]], TokenSelection]


def ways(lvlm: Any) -> dict[str, Select]:
    """How tokens are chosen."""
    random, oracle = RandomPruner(), OraclePruner()

    def other(encoded: Encoded, samples: Sequence[Sample]) -> TokenSelection:
        swapped = [
            sample._replace(region=next_region(at, samples)) for at, sample in enumerate(samples)
        ]
        return oracle.select(lvlm.encode(swapped, oracle.extras), NARROW)

    return {
        "all": lambda encoded, samples: keep_all(encoded),
        "random 1/9": lambda encoded, samples: random.select(encoded, RANDOM),
        "oracle 1/18": lambda encoded, samples: oracle.select(encoded, NARROW),
        "other oracle 1/18": other,
    }


def next_region(at: int, samples: Sequence[Sample]) -> Any:
    """The region of the next question about the same page, in a circle."""
    page = image_key(samples[at].uid)
    same = [number for number, sample in enumerate(samples) if image_key(sample.uid) == page]
    return samples[same[(same.index(at) + 1) % len(same)]].region


def by_page(samples: Sequence[Sample], size: int = BATCH) -> list[list[Sample]]:
    """Batches of about a size in which all questions about a page are together."""
    pages: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        pages[image_key(sample.uid)].append(sample)
    batches: list[list[Sample]] = [[]]
    for page in pages.values():
        if batches[-1] and len(batches[-1]) + len(page) > size:
            batches.append([])
        batches[-1] += page
    return batches


@torch.no_grad()
def measure(
    lvlm: Any, data: Screens, limit: int | None, size: int = BATCH
) -> dict[str, dict[str, float]]:
    """Percent right for each way and family, and over `click` and `read`."""
    samples = take(data, range(min(limit or len(data), len(data))))
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    chosen = ways(lvlm)
    for batch in by_page(samples, size):
        encoded = lvlm.encode(batch, frozenset({"region"}))
        for name, select in chosen.items():
            answers = lvlm.answer(splice(encoded, select(encoded, batch)))
            for sample, answer in zip(batch, answers, strict=True):
                kind = "click" if sample.family in POINTING else "read"
                for group in (kind, sample.family):
                    scores[name][group].append(data.score(sample, answer))
    return {
        name: {group: 100 * sum(values) / len(values) for group, values in groups.items()}
        for name, groups in scores.items()
    }


def verdicts(rates: dict[str, dict[str, float]]) -> list[tuple[str, float, bool]]:
    """Each gate, what was measured, and whether it is met."""
    click = {name: groups["click"] for name, groups in rates.items()}
    lost = click["all"] - click["random 1/9"]
    guided = click["oracle 1/18"] - click["other oracle 1/18"]
    return [
        (f"clicks with all tokens, at least {FULL} %", click["all"], click["all"] >= FULL),
        (f"random at 1/9 loses at least {LOST} points", lost, lost >= LOST),
        (
            f"another question's oracle at 1/18 loses at least {GUIDED} points",
            guided,
            guided >= GUIDED,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=BATCH, help="questions at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        lvlm = Llava(str(options.model), "tiny_screens", max_new_tokens=16)
        data = Screens(options.split, bare=True)
        rates = measure(lvlm, data, options.limit, options.batch)
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, groups in rates.items():
        print(
            f"{name:18}", " ".join(f"{group} {rate:.1f}" for group, rate in sorted(groups.items()))
        )
    for gate, value, met in verdicts(rates):
        print(f"{'met ' if met else 'open'} {gate}: {value:.1f}")


if __name__ == "__main__":
    main()
