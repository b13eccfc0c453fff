"""Disk, memory and rates of stored demonstrations at LLaVA-1.5 size, with synthetic features (no
model is run).

Every question has an image of its own: 576 tokens with codes of 64 random fp16 numbers, 12 words
out of 2,000 with embeddings of width 4,096, and three nested random masks. They go through
`demonstrate` as those of a real run do.

    python experiments/speed/store/measure.py FOLDER [--questions N] [--kill]

writes to FOLDER (deleted afterwards) and prints one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tprl.policy.networks import PolicyInput
from tprl.pruners.random import RandomPruner
from tprl.runtime.store import Cache
from tprl.stages.demonstrations import StoredDemonstrations, demonstrate
from tprl.types import Encoded

TOKENS, CODES, WIDTH, WORDS, VOCABULARY, STEPS, BATCH = (
    576,
    64,
    4096,
    12,
    2000,
    (0.8, 0.6, 0.4),
    128,
)
NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32)).half()
TABLE = torch.from_numpy(
    np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
).half()


class Questions:
    """As many as asked for; the content comes from the uid."""

    name = "synthetic"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return SimpleNamespace(uid=f"synthetic/{index}")


class Synthetic:
    """In place of the LVLM and of the learner's autoencoder: hands out noise."""

    autoencoder = None

    def encode(self, samples: list[Any], extras: frozenset[str]) -> Encoded:
        b = len(samples)
        mask, at = torch.ones(b, TOKENS, dtype=torch.bool), torch.arange(TOKENS).repeat(b, 1)
        tiny = torch.zeros(b, 1, dtype=torch.long)
        return Encoded(
            uids=tuple(sample.uid for sample in samples),
            input_ids=tiny,
            embeds=torch.zeros(b, 1, 1),
            attention=tiny.bool(),
            positions=tiny[None],
            visual_at=at,
            visual_mask=mask,
            image_of=torch.zeros_like(at),
            grids=((((24, 24),),),) * b,
            question=tiny.bool(),
        )

    def observe(self, encoded: Encoded) -> PolicyInput:
        numbers = torch.tensor([int(uid.rpartition("/")[2]) for uid in encoded.uids])
        # Any 36,864 numbers in a row of the noise: a prime stride makes every question's codes its
        # own.
        starts = (numbers * 104_729 % (len(NOISE) - TOKENS * CODES)).tolist()
        codes = torch.stack(
            [NOISE[start : start + TOKENS * CODES].view(TOKENS, CODES) for start in starts]
        )
        words = TABLE[(numbers[:, None] * 31 + torch.arange(WORDS) * 97) % VOCABULARY]
        side = (torch.arange(24) + 0.5) / 24
        xy = torch.stack([side.repeat(24), side.repeat_interleave(24)], 1).expand(
            len(numbers), -1, -1
        )
        real = torch.ones(len(numbers), WORDS, dtype=torch.bool)
        return PolicyInput(codes, xy, encoded.visual_mask, words, real)


def store(folder: Path, count: int) -> StoredDemonstrations:
    fake: Any = Synthetic()
    cache = Cache(folder, {"model": "synthetic, of the size of LLaVA-1.5-7B"})
    options: Any = {"progressive": STEPS, "cache": cache, "quiet": False}
    return demonstrate(RandomPruner(), fake, fake, Questions(count), count, [1.0], 3, **options)


def memory() -> dict[str, float]:
    """MB now and at most; `VmHWM` counts mapped files too."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM", "RssAnon")
    }


def epoch(stored: StoredDemonstrations, seed: int) -> float:
    """Seconds to read every question once, in random batches."""
    start, seen = time.monotonic(), 0
    for batch in stored.batches(BATCH, torch.Generator().manual_seed(seed)):
        seen += int(batch.x.mask[:, 0].sum())
    assert seen == len(stored)
    return time.monotonic() - start


def forget(stored: StoredDemonstrations) -> None:
    """Take the files out of the system's page cache."""
    for path in stored.paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def killed(folder: Path, count: int) -> int:
    """Questions that a writer had committed when it was killed at about half."""
    writer = subprocess.Popen(
        [sys.executable, __file__, str(folder), "--questions", str(count), "--only-write"]
    )
    while len(list(folder.glob("*/*.safetensors"))) * 500 < count // 2:
        time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    return len(list(folder.glob("*/*.safetensors"))) * 500


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=50_000)
    parser.add_argument("--kill", action="store_true", help="a first writer is killed half-way")
    parser.add_argument("--only-write", action="store_true")
    arguments = parser.parse_args()
    if arguments.only_write:
        store(arguments.folder, arguments.questions)
        return
    numbers: dict[str, Any] = {"questions": arguments.questions}
    try:
        if arguments.kill:
            numbers["there_after_kill_9"] = killed(arguments.folder, arguments.questions)
        before, start = memory(), time.monotonic()
        stored = store(arguments.folder, arguments.questions)
        wrote = time.monotonic() - start
        size = sum(path.stat().st_size for path in stored.paths)
        missing = arguments.questions - numbers.get("there_after_kill_9", 0)
        numbers |= {
            "files": len(stored.paths),
            "disk_gb": size / 1e9,
            "disk_kb_per_question": size / arguments.questions / 1e3,
            "write_s": wrote,
            "write_mb_per_s": size / 1e6 * missing / arguments.questions / wrote,
            "peak_extra_rss_mb_writing": memory()["VmHWM"] - before["VmHWM"],
        }
        start = time.monotonic()
        stored = store(arguments.folder, arguments.questions)
        numbers["open_s"] = time.monotonic() - start
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = memory()
        forget(stored)
        numbers["epoch_s_cold"] = epoch(stored, 0)
        numbers["epoch_s_warm"] = epoch(stored, 1)
        numbers["read_mb_per_s_warm"] = size / 1e6 / numbers["epoch_s_warm"]
        numbers["peak_extra_rss_mb_reading"] = memory()["VmHWM"] - before["VmRSS"]
        padded = TOKENS * (CODES * 2 + 2 * 4 + 1 + len(STEPS)) + WORDS * (WIDTH * 2 + 1)
        numbers["in_ram_padded_gb"] = padded * arguments.questions / 1e9
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
