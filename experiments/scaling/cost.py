"""What choosing tokens costs: CPU seconds of one thread, so that other processes on the machine do
not count.

python experiments/scaling/cost.py
"""

import resource
import statistics
import time
from collections.abc import Callable

import torch
from needle import WIDTH, NeedleDataset, NeedleLVLM

from tprl.policy import sequential
from tprl.pruners.tprl import TPRL

SIZES = (576, 1296, 2916, 5041)
UPDATES = (576, 1280, 2880)
PROMPTS, GROUP, EPOCHS, RATIOS = 24, 16, 3, (1 / 9, 1 / 18, 1 / 36)  # stage=ppo's defaults


def seconds(work: Callable[[], object], rounds: int = 5) -> tuple[float, float]:
    """(median, largest deviation from it) of CPU seconds."""
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    middle = statistics.median(times)
    return middle, max(abs(value - middle) for value in times)


def select(tokens: int) -> None:
    lvlm = NeedleLVLM(tokens)
    encoded = lvlm.encode([NeedleDataset("val")[0]])
    pruner = TPRL(WIDTH, code_width=64, hidden=512, width=64, layers=2, heads=4).eval()
    for ratio in (1 / 3, 1 / 9):
        whole, spread = seconds(lambda ratio=ratio: pruner.select(encoded, ratio))
        x = pruner.observe(encoded)
        k = torch.tensor([round(ratio * tokens)])
        greedy, _ = seconds(
            lambda k=k, x=x: sequential.greedy(torch.randn(1, tokens), x.features, x.mask, k)
        )
        print(
            f"| select | {tokens} | {ratio:.3f} | {whole:.3f} +- "
            f"{spread:.3f} s, of it greedy MAP {greedy:.3f} s |"
        )


def update(tokens: int) -> None:
    """One PPO iteration's part that the set policy has: drawing, and log-probabilities with
    gradient in each epoch."""
    features = torch.nn.functional.normalize(torch.randn(1, tokens, 64), dim=2)
    alive, total = torch.ones(1, tokens, dtype=torch.bool), 0.0
    for ratio in RATIOS:
        k = torch.tensor([round(ratio * tokens)])
        scores = torch.randn(1, tokens, requires_grad=True)
        noise = torch.rand(1, GROUP, tokens)

        def iteration(
            scores: torch.Tensor = scores, k: torch.Tensor = k, noise: torch.Tensor = noise
        ) -> None:
            order = sequential.draw(scores, features, alive, k, 1.0, noise)
            sequential.log_prob(scores, features, alive, k, 1.0, order)
            for _ in range(EPOCHS):
                sequential.log_prob(scores, features, alive, k, 1.0, order).sum().backward()

        total += seconds(iteration, rounds=3)[0] * PROMPTS / len(RATIOS)
    # of the whole process, PyTorch included
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hours = total * 200 / 3600
    print(
        f"| update | {tokens} | all | {total:.1f} s per "
        f"iteration, {hours:.2f} h per 200; peak {peak:.2f} GiB |"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| what | tokens | keep ratio | CPU time of one thread |\n|---|---|---|---|")
    for size in UPDATES:  # first and from small to large, so that the peak is theirs
        update(size)
    for size in SIZES:
        select(size)
