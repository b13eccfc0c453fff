"""Greedy ids of vLLM against `tprl.prune` in transformers, setting by setting; writes
equal_<world>.json.

.venv-vllm/bin/python experiments/serving/equal.py [questions] [scenes|crowd]
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests_vllm import conftest  # noqa: F401  # the environment, before vLLM is imported
from tests_vllm.engines import ask, compare, engine, export, model_of, questions, reference

from tprl.build import load_component
from tprl.data.crowd import Crowd
from tprl.data.scenes import Scenes

WORLDS = {  # model, its questions, the pruner that ships for it
    "scenes": ("tiny_llava", Scenes, "tprl_tiny_llava"),
    "crowd": ("tiny_crowd", Crowd, "tprl_tiny_crowd"),
}


def settings_of(policy: str) -> list[tuple[str, str, float, str]]:
    """Name, pruner, keep ratio, positions."""
    return [
        ("unpruned", "keep_all", 1.0, "keep"),
        ("tprl keep", policy, 1 / 9, "keep"),
        ("tprl compact", policy, 1 / 9, "compact"),
        ("divprune keep", "divprune", 1 / 9, "keep"),
    ]


def main(count: int, world: str) -> None:
    """All settings on the first `count` test questions; every question asked twice of one
    engine."""
    model, data, policy = WORLDS[world]
    lvlm, samples = load_component("model", model), questions(count, world=data)
    images = len({id(sample.images[0]) for sample in samples})
    rows, answers = {}, {}
    for name, pruner, ratio, positions in settings_of(policy):
        answers[name] = reference(lvlm, samples, pruner, ratio, positions)
        with tempfile.TemporaryDirectory() as folder:
            export(Path(folder), lvlm, pruner, ratio, positions)
            started = time.monotonic()
            with engine(Path(folder)) as llm:
                first = compare(answers[name], ask(llm, samples))
                calls = model_of(llm).pruner_calls
                second = compare(answers[name], ask(llm, samples))
                rows[name] = {
                    "first": first._asdict(),
                    "again": second._asdict(),
                    "pruner_calls": calls,
                    "pruner_calls_again": model_of(llm).pruner_calls - calls,
                    "seconds": round(time.monotonic() - started, 1),
                }
        print(name, rows[name], flush=True)
    pairs = zip(answers["tprl keep"], answers["tprl compact"], strict=True)
    differ = sum(keep.ids != compact.ids for keep, compact in pairs)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "model": model,
        "policy": policy,
        "questions": count,
        "images": images,
        "settings": rows,
        "keep_against_compact_differ": differ,
    }
    Path(__file__).with_name(f"equal_{world}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("keep and compact differ on", differ)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1000, sys.argv[2] if sys.argv[2:] else "scenes")
