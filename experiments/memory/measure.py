"""Memory that a training really takes, against what `src.check` forecasts: LLaVA's widths, random
weights, on the CPU, where the resident memory of a process stands for that of the device.

    python experiments/memory/measure.py --layers 3 stage=ppo stage.prompts=4 ...

Measured is the highest resident memory of `src.train` less that of the same command on the small
random LLaVA, which is the interpreter and its libraries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))
PAGE, GIB = os.sysconf("SC_PAGE_SIZE"), 2**30


def words(layers: int, tower: int) -> list[str]:
    """LLaVA-1.5-7B's widths with so many layers."""
    return [
        "+geometry=llava_1_5_7b",
        f"model.geometry.text_config.num_hidden_layers={layers}",
        f"model.geometry.vision_config.num_hidden_layers={tower}",
    ]


def peak(options: list[str]) -> int:
    """The highest resident memory of a training, read every few milliseconds."""
    highest = 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "src.train", *options, f"hydra.run.dir={folder}/run"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        memory = Path(f"/proc/{process.pid}/statm")
        while process.poll() is None:
            try:
                highest = max(highest, int(memory.read_text().split()[1]) * PAGE)
            except (FileNotFoundError, IndexError, ProcessLookupError):  # it has just ended
                break
            time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return highest


def forecast(options: list[str]) -> tuple[float, str, float]:
    """Bytes of the largest stage, what fills them, and those of the weights."""
    from tprl.bench.forecast import stage_needs
    from tprl.commands.check import composed, model_of
    from tprl.commands.costs import sizes, typical
    from tprl.commands.setup import plain
    from tprl.data.scenes import Scenes

    config = composed(options)
    lvlm = model_of(config)
    model, question = sizes(config, lvlm), typical(lvlm, Scenes("train")[0])
    needs = stage_needs(plain(config.stage), model, question, False, 0)
    most = max(needs, key=lambda need: need.device_bytes)
    return most.device_bytes, f"{most.name}: {most.largest}", model.weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tower", type=int, default=24)
    asked, options = parser.parse_known_args()
    small = ["model=llava", "model.pretrained=null", "model.max_new_tokens=2"]
    small += ["trainer=cpu", "logger=none", "cache=null", *options]
    large = [*small, *words(asked.layers, asked.tower)]
    bytes_forecast, largest, weights = forecast(large)
    base, start = peak(small), time.time()
    measured = peak(large) - base
    print(
        json.dumps(
            {
                "layers": asked.layers,
                "forecast GiB": round(bytes_forecast / GIB, 3),
                "measured GiB": round(measured / GIB, 3),
                "ratio": round(bytes_forecast / measured, 3),
                "weights GiB": round(weights / GIB, 3),
                "largest": largest,
                "base GiB": round(base / GIB, 3),
                "seconds": round(time.time() - start),
            }
        )
    )


if __name__ == "__main__":
    main()
