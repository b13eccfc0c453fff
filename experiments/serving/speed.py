"""Requests a second with all visual tokens and with fewer, in turns in one engine; writes
speed.json and speed.md.

    .venv-vllm/bin/python experiments/serving/speed.py --rounds 3 --concurrencies 1,4 --clock cpu

With `--clock cpu` seconds are those that this process computes, on one thread; where others use the
machine too, those of the wall say nothing.

A random LLaVA whose language model dominates (78 M parameters; 576 tokens an image). Prompts bring
embeddings, so that one engine serves every ratio; vision tower and pruner, which pruning does not
make cheaper, are left out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tests_vllm import conftest  # noqa: F401  # the environment, before vLLM is imported
from tests_vllm.engines import engine, export
from vllm import SamplingParams

from tprl.bench.serving import Step, measure, rows, serving_table
from tprl.budget import budget
from tprl.build import load_component

TOKENS, WORDS, LENGTH = 576, 64, 8  # visual tokens, words of a prompt, new tokens
RATIOS = {"all": 1.0, "1/3": 1 / 3, "1/9": 1 / 9, "1/18": 1 / 18}
LEAST = 2  # requests of a measurement; else as many as are in the engine at a time
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GEOMETRY = {
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 11,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
    },
    "vision_config": {"image_size": 192},
    "image_processor": {
        "size": {"height": 192, "width": 192},
        "crop_size": {"height": 192, "width": 192},
    },
}


class InProcess:
    """vLLM's engine in this process, step by step."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.how = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
        self.pool = self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def add(self, request: str, prompt: Any) -> None:
        self.engine.add_request(request, prompt, self.how)

    def step(self) -> Iterable[Step]:
        return [
            Step(o.request_id, len(o.outputs[0].token_ids), o.finished) for o in self.engine.step()
        ]

    def blocks(self) -> int:
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()


def loads(width: int, image: int) -> dict[str, Callable[[int], Sequence[Any]]]:
    """Prompts of an image and words, no two of them alike: no cache helps."""
    draw = torch.Generator().manual_seed(0)

    def fresh(kept: int) -> Callable[[int], Sequence[Any]]:
        def prompts(concurrency: int) -> Sequence[Any]:
            requests = []
            for _ in range(max(LEAST, concurrency)):
                words = torch.randint(10, 250, (WORDS,), generator=draw).tolist()
                embeds = torch.randn(1, kept, width, generator=draw)
                requests.append(
                    {"prompt_token_ids": [image, *words], "multi_modal_data": {"image": embeds}}
                )
            return requests

        return prompts

    return {name: fresh(budget(ratio, TOKENS)) for name, ratio in RATIOS.items()}


def main(rounds: int, concurrencies: Sequence[int], clock: Callable[[], float]) -> None:
    """All ratios at these concurrencies, `rounds` times."""
    load = os.getloadavg()[0]
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32", geometry=GEOMETRY)
    size = sum(weight.numel() for weight in lvlm.model.model.language_model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), lvlm, "keep_all", 1.0, "compact")
        options = {"max_model_len": 1024, "max_num_batched_tokens": 2048, "enable_mm_embeds": True}
        stock = {"architectures": ["LlavaForConditionalGeneration"]}
        with engine(Path(folder), hf_overrides=stock, **options) as llm:
            run, requests = InProcess(llm), loads(lvlm.width, lvlm.image_token)
            measure(run, {name: requests[name] for name in ("all", "1/9")}, (1,), 1)  # warm
            points = measure(run, requests, concurrencies, rounds, clock)
    lines = rows(points, "all")
    script = Path(__file__)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [load, os.getloadavg()[0]],  # of a minute, before and after
        "language_model_parameters": size,
        "rounds": rounds,
        "rows": [line._asdict() for line in lines],
    }
    script.with_name("speed.json").write_text(json.dumps(result, indent=1) + "\n")
    script.with_name("speed.md").write_text(serving_table(lines) + "\n")
    print(size, result["load_average"], serving_table(lines), sep="\n")


def positive(text: str) -> int:
    """A count, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def counts(text: str) -> list[int]:
    """Counts between commas."""
    return [positive(part) for part in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=3, help="measurements of every point")
    parser.add_argument(
        "--concurrencies",
        type=counts,
        default=[1, 4, 8, 16],
        help="requests at a time, e.g. 1,4,8,16",
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    main(options.rounds, options.concurrencies, CLOCKS[options.clock])
