"""Where the time of PPO's iterations goes, operation by operation: profile_ppo.py [ITERATIONS];
writes profile.txt.

The profiler slows small operations down: shares are of use, not seconds.
"""

import sys
from pathlib import Path

import torch
from common import fit, load_lvlm, make_ppo
from torch.profiler import ProfilerActivity, profile

from bench import SCHEDULES

LINES = 16


def profiled(iterations: int, name: str) -> str:
    """The operations that take longest themselves."""
    stage = make_ppo(load_lvlm(), iterations, **SCHEDULES[name])
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        fit(stage)
    table = trace.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=LINES, max_name_column_width=45
    )
    return f"{name}, {iterations} iterations\n{table}\n"


def main(iterations: int) -> None:
    torch.manual_seed(0)
    text = "\n".join(profiled(iterations, name) for name in SCHEDULES)
    Path(__file__).with_name("profile.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
