"""LVLM evaluations per second of PPO on one rank and on two, in turns: `python bench.py BASE
[--quick]` writes results.csv."""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def measured(ranks: int, base: str, iterations: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        command += [str(HERE / "worker.py"), base, str(iterations), str(out)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "src"),
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        return json.loads(out.read_text())


def main(base: str, rounds: int, iterations: int, table: Path) -> None:
    rows = []
    for number in range(rounds):
        for ranks in (1, 2) if number % 2 == 0 else (2, 1):  # whatever drifts meets both alike
            measurement = measured(ranks, base, iterations)
            seconds = statistics.median(measurement["seconds"])
            rows.append(
                {
                    "round": number,
                    "ranks": ranks,
                    "seconds_per_iteration": round(seconds, 4),
                    "evaluations_per_second": round(measurement["episodes"] / seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    speed = {(row["round"], row["ranks"]): row["evaluations_per_second"] for row in rows}
    for ranks in (1, 2):
        values = [speed[number, ranks] for number in range(rounds)]
        print(
            f"{ranks} rank(s): median {statistics.median(values):.1f} "
            f"evaluations/s ({min(values):.1f} to {max(values):.1f})"
        )
    ratios = [speed[number, 2] / speed[number, 1] for number in range(rounds)]
    print(
        f"1 -> 2 ranks: median x{statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)"
    )


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    target = Path(tempfile.gettempdir()) / "ddp_quick.csv" if quick else HERE / "results.csv"
    main(sys.argv[1], *((1, 2) if quick else (5, 6)), table=target)
