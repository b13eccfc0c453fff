"""All that has to be looked at on a GPU, in one go: python experiments/gpu_checks/run.py (make
gpu-checks).

Every check is a command of its own. What went well is not run again, so a run that was cut off goes
on; `results.json` and `table.md` are written after each check. `--small` runs what a CPU can run,
on small models, and writes into a folder `small/` of its own: what it says is not what a GPU would.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (
    "[llava,llava_next,llava_onevision,qwen2_vl,qwen2_5_vl,qwen3_vl,qwen3_5,internvl3,smolvlm2,"
    "gemma3,gemma4,mistral3,glm4v]"
)
LLAVA_7B = ("model=llava", "model.pretrained=null", "geometry=llava_1_5_7b", "model.dtype=bfloat16")
QUIET = ("logger=none",)
OUT = "{out}"  # in the words of a command: the check's own folder
PATIENCE = 5  # times the limit of a check on a CPU, which may be a shared one
TAIL = 4000  # letters of a check's output that are kept


@dataclass(frozen=True)
class Check:
    """One command and what to look for.

    Args:
        name: of its row.
        look: what should be seen.
        words: of the command, after the interpreter; on a GPU.
        small: the same on a CPU, on small models; None: it says nothing there.
        package: that it needs beside ours.
        pattern: what of the output goes into the table, the last match.
        minutes: after which it is given up; on a CPU `PATIENCE` times as many.
    """

    name: str
    look: str
    words: tuple[str, ...]
    small: tuple[str, ...] | None = None
    package: str | None = None
    pattern: str | None = None
    minutes: float = 3.0


def evaluation(*words: str) -> tuple[str, ...]:
    return ("-m", "src.eval", *QUIET, *words)


CHECKS = (
    Check(
        "chain",
        "the whole chain runs, policy and model on the same device",
        ("-m", "src.train", "debug=fast", *QUIET),
        ("-m", "src.train", "debug=fast", *QUIET),
        pattern=r"run: .*",
    ),
    Check(
        "parity",
        "all kept 0, the others near 1e-5, the same ids",
        evaluation("mode=parity", f"models={FAMILIES}", "limit=3"),
        evaluation("mode=parity", "models=[llava]", "limit=3"),
        pattern=r"\| `\w+` \|.*",
    ),
    Check(
        "parity_bf16",
        "differences small against the logits' spread, the same ids",
        evaluation(
            "mode=parity",
            "model=qwen2_5_vl",
            "model.pretrained=null",
            "model.dtype=bfloat16",
            "limit=3",
        ),
        pattern=r"\| `\w+` \|.*",
    ),
    Check(
        "flash_attention",
        "as parity_bf16: gapped positions above all",
        evaluation(
            "mode=parity",
            "model=llava",
            "model.pretrained=null",
            "model.dtype=bfloat16",
            "model.attention=flash_attention_2",
            "limit=3",
        ),
        package="flash_attn",
        pattern=r"\| `\w+` \|.*",
    ),
    Check(
        "four_bits",
        "it loads and runs; answers agree with those of the whole weights up to rounding",
        evaluation(
            "mode=parity",
            "model=tiny_llava",
            "model.load_in=4bit",
            "model.dtype=bfloat16",
            "limit=3",
        ),
        package="bitsandbytes",
        pattern=r"\| `\w+` \|.*",
    ),
    Check(
        "latency",
        (
            "pruned prefill near what FLOPs predict; TPRL's "
            "selector at most 3 % of the unpruned prefill"
        ),
        evaluation(
            "mode=latency",
            *LLAVA_7B,
            "pruners=[divprune,tprl]",
            "keep_ratios=[0.333,0.111]",
            "latency.batch_sizes=[1]",
            "latency.repeats=5",
        ),
        evaluation(
            "mode=latency",
            "pruners=[divprune,tprl]",
            "keep_ratios=[0.333]",
            "latency.batch_sizes=[1]",
            "latency.repeats=1",
            "latency.warmup=0",
        ),
        pattern=r"\|.*tprl.*\|",
        minutes=4,
    ),
    Check(
        "selectors",
        "at least 3 times the published form at batch 8",
        ("experiments/speed/selectors/bench.py", "20", f"{OUT}/selectors.csv", "cuda"),
        pattern=r"least gain: .*",
    ),
    Check(
        "ppo",
        "at least 20 times the evaluations per second of a loop",
        (
            "experiments/speed/ppo/bench.py",
            "--device",
            "cuda",
            "--lvlm",
            "float32,bfloat16",
            "--threads",
            "2",
            "--out",
            OUT,
        ),
        pattern=r".*evaluations/s.*",
    ),
    Check(
        "forecast",
        "GiB and hours; compare them with nvidia-smi and the clock of a real run",
        ("-m", "src.check", "model=tiny_llava"),
        ("-m", "src.check", "model=tiny_llava", "trainer=cpu"),
        pattern=r"ppo .*",
    ),
)


def run(
    checks: Sequence[Check], folder: Path, small: bool = False, again: bool = False
) -> list[dict[str, Any]]:
    """Run what did not go well before, by the same command, and return the results of all, in
    order."""
    folder = folder / "small" if small else folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    known = (
        {}
        if again or not file.is_file()
        else {row["name"]: row for row in json.loads(file.read_text())}
    )
    for check in checks:
        if finished(known.get(check.name, {}), check, small):
            continue
        print(f"{check.name}: {check.look}", flush=True)
        known[check.name] = one_check(check, folder, small)
        rows = [known[other.name] for other in checks if other.name in known]
        file.with_suffix(".part").write_text(json.dumps(rows, indent=1) + "\n")
        file.with_suffix(".part").replace(file)
        (folder / "table.md").write_text(table(rows))
    return [known[check.name] for check in checks]


def finished(row: dict[str, Any], check: Check, small: bool) -> bool:
    """Whether a row says of this command that it went well; what was skipped may be possible by
    now."""
    words = check.small if small else check.words
    return row.get("state") == "ok" and words is not None and row["command"] == list(words)


def one_check(check: Check, folder: Path, small: bool) -> dict[str, Any]:
    """Run a check; its state is ok, failed, timeout or skipped."""
    words = check.small if small else check.words
    row: dict[str, Any] = {"name": check.name, "look": check.look, "seconds": 0.0, "result": ""}
    if words is None:
        return row | {"state": "skipped", "result": "needs a GPU"}
    if check.package is not None and find_spec(check.package) is None:
        return row | {"state": "skipped", "result": f"{check.package} is not installed"}
    out = folder / check.name
    out.mkdir(exist_ok=True)
    command = [sys.executable, *(word.replace(OUT, str(out)) for word in words)]
    if words[:2] in (("-m", "src.train"), ("-m", "src.eval")):
        command.append(f"hydra.run.dir={out}")
    limit = 60 * check.minutes * (PATIENCE if small else 1)
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        state, output = ("ok" if done.returncode == 0 else "failed"), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        state, output = "timeout", str(error)
    matches = re.findall(check.pattern, output) if check.pattern else []
    if state == "ok" and check.pattern and not matches:
        state, output = "failed", f"{output}\nthe output holds nothing like {check.pattern}"
    result = matches[-1] if state == "ok" and matches else (output.strip().splitlines() or [""])[-1]
    seconds = round(time.monotonic() - started, 1)
    return row | {
        "state": state,
        "seconds": seconds,
        "result": result.strip(),
        "command": list(words),
        "tail": output[-TAIL:],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line per check."""
    lines = ["| check | state | s | what came out | what should |", "|---|---|---|---|---|"]
    for row in rows:
        result = row["result"].replace("|", "\\|")
        lines.append(
            f"| {row['name']} | {row['state']} | {row['seconds']:.0f} | {result} | {row['look']} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu_checks", help="where results are written"
    )
    parser.add_argument("--small", action="store_true", help="what a CPU can run")
    parser.add_argument("--again", action="store_true", help="run finished checks too")
    options = parser.parse_args(words)
    rows = run(CHECKS, options.out, options.small, options.again)
    print(table(rows))
    return int(any(row["state"] not in ("ok", "skipped") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
