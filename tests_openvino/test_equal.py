"""The exported program answers as `tprl.prune` does in transformers, and keeps the same tokens."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

import tprl
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import load_pruner
from tprl.serving.openvino.convert import compress, convert
from tprl.serving.openvino.runtime import Answerer
from tprl.serving.settings import Settings
from tprl.types import Sample

SAMPLES = [Scenes("test")[index] for index in range(int(os.environ["TPRL_QUESTIONS"]))]
LENGTH = 16


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def folder(lvlm: FrozenLVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("openvino")
    convert(lvlm, load_pruner("tprl_tiny_llava"), Settings(1 / 9), place)
    return place


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return Answerer(folder)


@torch.no_grad()
def reference(
    lvlm: FrozenLVLM, samples: list[Sample], ratio: float, positions: str
) -> list[tuple[list[int], ...]]:
    """(ids, places of the kept tokens) of every question."""
    answers = []
    with tprl.prune(
        lvlm.model, "tprl", ratio, processor=lvlm.processor, positions=positions
    ) as pruning:
        for sample in samples:
            inputs = lvlm.processor(
                text=lvlm.render(sample), images=list(sample.images), return_tensors="pt"
            )
            out = lvlm.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
            answers.append(
                (
                    out[0, inputs["input_ids"].shape[1] :].tolist(),
                    pruning.kept[0][0].indices.tolist(),
                )
            )
    return answers


def answered(
    answerer: Answerer, samples: list[Sample], ratio: float | None
) -> list[tuple[list[int], ...]]:
    result = []
    for sample in samples:
        ids = answerer(sample.images[0], sample.question, ratio, LENGTH)
        result.append((ids, answerer.kept.tolist()))
    return result


def test_ids_and_kept_tokens_are_equal(lvlm: FrozenLVLM, answerer: Answerer) -> None:
    assert answered(answerer, SAMPLES, None) == reference(lvlm, SAMPLES, 1 / 9, "keep")


@pytest.mark.parametrize("ratio", [1.0, 1 / 3, 0.05])
def test_the_ratio_is_an_input(lvlm: FrozenLVLM, answerer: Answerer, ratio: float) -> None:
    assert answered(answerer, SAMPLES[:8], ratio) == reference(lvlm, SAMPLES[:8], ratio, "keep")


def test_compact_positions_answer_otherwise(
    lvlm: FrozenLVLM, folder: Path, answerer: Answerer
) -> None:
    compact = reference(lvlm, SAMPLES, 1 / 9, "compact")
    keep = answered(answerer, SAMPLES, None)
    assert (
        sum(ours[0] != counterpart[0] for ours, counterpart in zip(keep, compact, strict=True))
        > len(SAMPLES) / 10
    )
    other = Answerer(folder)
    other.facts["positions"] = "compact"
    assert answered(other, SAMPLES, None) == compact


def test_the_program_runs_without_torch(folder: Path, answerer: Answerer, tmp_path: Path) -> None:
    SAMPLES[0].images[0].save(tmp_path / "image.png")
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        f"sys.argv = ['answer.py', {str(tmp_path / 'image.png')!r}, {SAMPLES[0].question!r}]; "
        f"runpy.run_path({str(folder / 'answer.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == answerer.text(SAMPLES[0].images[0], SAMPLES[0].question)


def test_a_ratio_that_cannot_be(answerer: Answerer) -> None:
    with pytest.raises(ValueError, match=r"keep_ratio must be a number in \(0, 1\], got 1\.7"):
        answerer(SAMPLES[0].images[0], SAMPLES[0].question, 1.7)
    with pytest.raises(ValueError, match="words without an image placeholder, got '<image> what'"):
        answerer(SAMPLES[0].images[0], "<image> what")
    with pytest.raises(ValueError, match="words without an image placeholder, got ' '"):
        answerer(SAMPLES[0].images[0], " ")


class TestInt8:
    def test_rows_are_within_half_a_step(self) -> None:
        from openvino import opset13 as operators

        matrix = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
        matrix[3] = 0
        options = operators.parameter([1, 5], ov.Type.f32)
        graph = ov.Model(
            [operators.matmul(options, operators.constant(matrix), False, True)], [options]
        )
        assert compress(graph) == 1
        how = {"INFERENCE_PRECISION_HINT": "f32"}
        out = ov.compile_model(graph, "CPU", how)(np.ones((1, 5), np.float32))[0][0]
        step = np.abs(matrix).max(1) / 127
        assert (np.abs(out - matrix.sum(1)) <= 5 * step / 2 + 1e-6).all()

    def test_most_answers_survive_in_a_third_of_the_size(
        self, lvlm: FrozenLVLM, folder: Path, answerer: Answerer, tmp_path: Path
    ) -> None:
        convert(lvlm, load_pruner("tprl_tiny_llava"), Settings(1 / 9), tmp_path, "int8")
        sizes = [
            sum(path.stat().st_size for path in place.glob("*.bin")) for place in (tmp_path, folder)
        ]
        assert sizes[0] < sizes[1] / 3
        pairs = zip(
            answered(Answerer(tmp_path), SAMPLES, None),
            answered(answerer, SAMPLES, None),
            strict=True,
        )
        assert sum(ours[0] == counterpart[0] for ours, counterpart in pairs) > 0.7 * len(SAMPLES)


class TestRefusals:
    def refused(self, lvlm: Any, pruner: Any, place: Path) -> str:
        with pytest.raises(UserError) as caught:
            convert(lvlm, pruner, Settings(1 / 9), place)
        assert not list(place.iterdir())
        return str(caught.value)

    def test_what_has_no_graph(self, lvlm: FrozenLVLM, tmp_path: Path) -> None:
        divprune = load_component("pruner", "divprune")
        assert self.refused(lvlm, divprune, tmp_path).startswith(
            "pruner divprune has no graph for OpenVINO"
        )
        qwen = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
        assert "target=openvino converts llava alone" in self.refused(
            qwen, load_pruner("tprl_tiny_llava"), tmp_path
        )
        assert "its own budget" in self.refused(
            lvlm, load_component("pruner", "tprl_adaptive"), tmp_path
        )
