"""LVLM evaluations per second: PPO as it is, against a loop that reads one sample at a time and
generates.

    .venv/bin/python experiments/speed/ppo/bench.py [--quick] [--rounds 5] [--threads 1,2]
        [--lvlm float32,bfloat16]

Writes results.csv and ablation.csv beside this file (with --quick: into a temporary folder, and
says where).
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from common import LINEARS, fit, load_lvlm, make_ppo

from tprl.pruners.random import RandomPruner
from tprl.rl.rollout import collect
from tprl.scoring.scorer import Scorer
from tprl.splice import keep_all, splice
from tprl.types import Sample, TokenSelection

HERE = Path(__file__).resolve().parent
RATIOS = (0.1111, 0.0556, 0.0278)  # those that conf/stage/ppo.yaml trains
# Two schedules: the one of `make demo`, and the paper's (200 epochs x 64 rollouts, three steps, the
# task's own score).
SCHEDULES: dict[str, dict[str, Any]] = {
    "make demo": {},
    "paper": {
        "reward": "score_change",
        "prompts": 64,
        "group": 1,
        "steps": 3,
        "advantage": "gae",
        "minibatch": 16,
        "update_epochs": 4,
        "keep_ratio": 1 / 3,
    },
}


class Row(NamedTuple):
    """Medians over the rounds; the ratio's range is over the pairs of neighbors in time."""

    what: str
    lvlm: str
    threads: int
    rounds: int
    evaluations: int  # of the batched side, per round
    batched_per_second: float
    loop_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


def row(what: str, lvlm: str, evaluations: int, batched: list[float], loop: list[float]) -> Row:
    ratios = [a / b for a, b in zip(batched, loop, strict=True)]
    rates = statistics.median(batched), statistics.median(loop)
    entry = Row(
        what,
        lvlm,
        torch.get_num_threads(),
        len(ratios),
        evaluations,
        *rates,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )
    print(
        (
            f"{what:22} {lvlm:9} {entry.threads} threads: {rates[0]:7.1f} "
            f"against {rates[1]:6.1f} evaluations/s, ratio {entry.ratio:5.1f} "
            f"({entry.ratio_low:.1f} to {entry.ratio_high:.1f})"
        ),
        flush=True,
    )
    return entry


def rate(work: Callable[[], int]) -> float:
    """Evaluations per second of one call, which returns how many it made."""
    start = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - start)


def score_alone(lvlm: Any, dataset: Any, sample: Sample, prompt: Any) -> float:
    """One evaluation as the public reference makes it: the stock model generates, the text is
    scored."""
    return dataset.score(sample, lvlm.answer(prompt)[0])


# --- (a) scoring: masks are given -----------------------------------------------------------------


def scoring(lvlm: Any, kind: str, rounds: int, prompts: int, group: int, part: int) -> Row:
    """Encode questions, apply `group` selections to each, score all of them and all tokens once per
    question."""
    dataset = make_ppo(lvlm, 1).dataset
    stream = (dataset[i] for i in cycle(range(7, 600_000, 11)))  # a new image and family every time
    masks = RandomPruner(0)

    def drawn(encoded: Any, copies: int) -> torch.Tensor:
        """[B * copies, V] selections; a question has one of the ratios."""
        keeps = torch.stack([masks.select(encoded, ratio).keep for ratio in RATIOS])
        which = torch.arange(len(encoded)) % len(RATIOS)
        return keeps[which, torch.arange(len(encoded))].repeat_interleave(copies, 0)

    def batched() -> int:
        samples, scorer = (
            [next(stream) for _ in range(prompts)],
            Scorer(lvlm, dataset, frozenset({"log_prob"})),
        )
        encoded = lvlm.encode(samples)
        scorer.full(samples, encoded)
        rows = [i for i in range(prompts) for _ in range(group)]
        scorer.selections(samples, encoded, rows, drawn(encoded, group))
        return scorer.evaluations

    def loop() -> int:
        count = 0
        for number in range(part):
            sample = next(stream)
            for episode in range(group):
                encoded = lvlm.encode([sample])
                if not episode:
                    score_alone(lvlm, dataset, sample, splice(encoded, keep_all(encoded)))
                keep = masks.select(encoded, RATIOS[number % len(RATIOS)]).keep
                score_alone(lvlm, dataset, sample, splice(encoded, TokenSelection(keep)))
            count += 1 + group
        return count

    batched(), loop()
    pairs = [(rate(batched), rate(loop)) for _ in range(rounds)]
    return row("scoring", kind, prompts * (1 + group), [p[0] for p in pairs], [p[1] for p in pairs])


# --- (b) whole iterations -------------------------------------------------------------------------


class Rounds(pl.Callback):
    """Times every iteration from the end of the last one, drawing of images included, and in
    between the loop."""

    def __init__(self, loop: Callable[[Any], tuple[int, int]]) -> None:
        self.loop, self.batched, self.alone, self.shares = (
            loop,
            list[float](),
            list[float](),
            list[dict[str, float]](),
        )
        self.start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start, self.before = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        spent = time.perf_counter() - self.start
        self.made = pl_module.scorer.evaluations - self.before
        self.shares.append(
            {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("time/")}
        )
        self.batched.append(self.made / spent)
        start = time.perf_counter()
        done, episodes = self.loop(pl_module)
        # The loop's own policy update: ours, episode for episode. One in minibatches of its own
        # would cost it more.
        update = (
            self.shares[-1]["time/update"] * episodes / (len(batch) * pl_module.hparams["group"])
        )
        self.alone.append(done / (time.perf_counter() - start + update))
        self.before, self.start = pl_module.scorer.evaluations, time.perf_counter()


def one_at_a_time(
    stage: Any, questions: Iterator[Sample], count: int, group: int
) -> tuple[int, int]:
    """(evaluations, episodes) of `count` episodes: encode, sample a pruning step, generate, score;
    T times each.

    `group` episodes are of the same question, and the score with all tokens is measured once for
    it.
    """
    h, evaluations = stage.hparams, 0
    for episode in range(count):
        if episode % group == 0:
            sample = next(questions)
        encoded = stage.lvlm.encode([sample])
        if episode % group == 0:
            score_alone(stage.lvlm, stage.dataset, sample, splice(encoded, keep_all(encoded)))
            evaluations += 1
        x, rule = stage.pruner.observe(encoded), stage.rule()
        ratio = torch.tensor(
            [stage.ratios[(episode // group) % len(stage.ratios)]], dtype=torch.float64
        )
        noise = torch.rand(h["steps"], 1, 2 * x.mask.shape[1]).to(x.mask.device)
        rollout = collect(stage.net, x, rule, h["steps"], ratio.to(x.mask.device), noise)
        for keep in rollout.action:
            score_alone(stage.lvlm, stage.dataset, sample, splice(encoded, TokenSelection(keep)))
            evaluations += 1
    return evaluations, count


def iterations(lvlm: Any, what: str, kind: str, rounds: int, part: int, **changes: Any) -> Row:
    """Interleaved iterations of the stage and pieces of the loop; the first of both warms up and
    does not count."""
    stage = make_ppo(lvlm, rounds + 1, **changes)
    questions = (stage.dataset[i] for i in cycle(range(9, 600_000, 11)))
    group = stage.hparams["group"]
    watch = Rounds(lambda module: one_at_a_time(module, questions, part, group))
    fit(stage, watch)
    shares = {k: statistics.median(share[k] for share in watch.shares[1:]) for k in watch.shares[0]}
    print("   ", ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in shares.items()))
    return row(what, kind, watch.made, watch.batched[1:], watch.alone[1:])


# --- ablation of (a) ------------------------------------------------------------------------------


def ablation(threads: list[int], rounds: int) -> list[dict[str, Any]]:
    """Evaluations per second of the batched side of (a) alone, one thing changed at a time."""
    base: dict[str, Any] = {
        "lvlm": "float32",
        "micro_batch": 64,
        "prompts": 24,
        "threads": threads[-1],
    }
    changed: list[dict[str, Any]] = [{}]
    changed += [{"micro_batch": size} for size in (1, 4, 8, 16, 32, 128, 384)]
    changed += [{"prompts": count} for count in (1, 4, 96)]
    changed += [{"lvlm": kind} for kind in LINEARS[1:]]
    changed += [{"threads": count} for count in threads[:-1]]
    arms = [base | change for change in changed]
    lvlms = {kind: load_lvlm(kind) for kind in LINEARS}
    dataset, masks = make_ppo(lvlms["float32"], 1).dataset, RandomPruner(0)

    def work(arm: dict[str, Any]) -> int:
        lvlm, count = lvlms[arm["lvlm"]], arm["prompts"]
        lvlm.micro_batch = arm["micro_batch"]
        samples, scorer = (
            [dataset[i * 11] for i in range(count)],
            Scorer(lvlm, dataset, frozenset({"log_prob"})),
        )
        encoded = lvlm.encode(samples)
        scorer.full(samples, encoded)
        rows = [i for i in range(count) for _ in range(16)]
        keep = torch.stack([masks.select(encoded, RATIOS[i % 3]).keep[i] for i in range(count)])
        scorer.selections(samples, encoded, rows, keep.repeat_interleave(16, 0))
        return scorer.evaluations

    speeds: list[list[float]] = [[] for _ in arms]
    for _ in range(rounds + 1):  # interleaved; the first round warms up
        for arm, rates in zip(arms, speeds, strict=True):
            torch.set_num_threads(arm["threads"])
            rates.append(rate(lambda arm=arm: work(arm)))
    return [
        arm | {"evaluations_per_second": round(statistics.median(r[1:]), 1)}
        for arm, r in zip(arms, speeds, strict=True)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(
            {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    print(f"wrote {path}")


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two rounds of the float32 LVLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--lvlm", default=",".join(LINEARS))
    parser.add_argument(
        "--device", default="cpu", help="cuda: with --lvlm float32,bfloat16 --threads 2"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="the folder that tables are written into"
    )
    return parser.parse_args(words)


def main() -> None:
    arguments = options()
    threads, kinds = [int(n) for n in arguments.threads.split(",")], arguments.lvlm.split(",")
    folder, rounds = arguments.out, arguments.rounds
    if arguments.quick:
        folder, rounds, threads, kinds = Path(tempfile.mkdtemp()), 2, threads[-1:], kinds[:1]
    torch.manual_seed(0)
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for kind in kinds:
            lvlm = load_lvlm(kind, arguments.device)
            rows.append(scoring(lvlm, kind, rounds, 24, 16, part=2))
            for what, changes in SCHEDULES.items():
                part = 32 if changes.get("group") != 1 else 12
                rows.append(iterations(lvlm, what, kind, rounds, part, **changes))
    write(folder / "results.csv", [row._asdict() for row in rows])
    if not arguments.quick:
        write(folder / "ablation.csv", ablation(threads, rounds))


if __name__ == "__main__":
    main()
