"""Greedy ids of the engine are those of `tprl.prune` in transformers.

TPRL_QUESTIONS says how many questions are asked; experiments/serving/equal.py asks 1,000.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_vllm.engines import Answer, ask, compare, engine, export, model_of, questions, reference

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM

SETTINGS = {
    "unpruned": ("keep_all", 1.0, "keep"),
    "tprl": ("tprl", 1 / 9, "keep"),
    "compact": ("tprl", 1 / 9, "compact"),
    "divprune": ("divprune", 1 / 9, "keep"),
}
SAMPLES = questions(int(os.environ["TPRL_QUESTIONS"]))
IMAGES = len({id(sample.images[0]) for sample in SAMPLES})


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def answers(lvlm: FrozenLVLM) -> dict[str, list[Answer]]:
    return {name: reference(lvlm, SAMPLES, *setting) for name, setting in SETTINGS.items()}


@pytest.fixture(scope="module", params=SETTINGS)
def served(
    request: Any, lvlm: FrozenLVLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any]]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    export(folder, lvlm, *SETTINGS[request.param])
    with engine(folder) as llm:
        yield request.param, llm


def test_ids_are_equal_and_the_pruner_is_called_once_per_image_or_question(
    served: tuple[str, Any], answers: dict[str, list[Answer]]
) -> None:
    name, llm = served
    first = compare(answers[name], ask(llm, SAMPLES))
    assert not first.wrong, first.line
    assert model_of(llm).pruner_calls == (len(SAMPLES) if name in ("tprl", "compact") else IMAGES)

    again = compare(answers[name], ask(llm, SAMPLES))  # from the prefix cache
    assert not again.wrong, again.line


def test_the_comparison_can_fail(answers: dict[str, list[Answer]]) -> None:
    """Positions matter: the same kept tokens elsewhere are answered otherwise."""
    compact = [answer.ids for answer in answers["compact"]]
    assert len(compare(answers["tprl"], compact).wrong) > len(SAMPLES) / 10
