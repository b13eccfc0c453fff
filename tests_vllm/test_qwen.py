"""Small random Qwen2.5-VL and Qwen3-VL: three position axes, images of several sizes, features of
deeper layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests_vllm.engines import ask, compare, engine, export, questions, reference
from transformers import AutoProcessor
from vllm.exceptions import VLLMValidationError

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM
from tprl.serving.choose import Kept
from tprl.serving.vllm.qwen import QwenPruned
from tprl.types import Sample

PACKED = QwenPruned.packed
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
}
INTERLEAVED = {**TEXT["rope_parameters"], "mrope_interleaved": True}  # type: ignore[dict-item]
GEOMETRY: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {"text_config": TEXT, "vision_config": {"out_hidden_size": 128}},
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": INTERLEAVED, "head_dim": 32},
        "vision_config": {"out_hidden_size": 128},
    },
}


def shaped(samples: list[Sample]) -> list[Sample]:
    """The same questions about images of different shapes; the last prompt shows two of them."""
    sizes = [(224, 224), (168, 280), (280, 112)]
    images = [Image.Image.resize(s.images[0], sizes[n % 3]) for n, s in enumerate(samples)]
    changed = [
        sample._replace(images=(image,)) for sample, image in zip(samples, images, strict=True)
    ]
    return [*changed[:-1], changed[-1]._replace(images=(images[-1], images[-2]))]


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_ids_are_equal(
    name: str, positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm: FrozenLVLM = load_component(
        "model", name, pretrained=None, dtype="float32", geometry=GEOMETRY[name]
    )
    export(tmp_path, lvlm, "question_dpp", 1 / 4, positions)
    # The engine's own processor: its resize differs from ours by a gray level.
    lvlm.processor = AutoProcessor.from_pretrained(tmp_path)
    lvlm.processor.tokenizer.padding_side = "left"
    samples = shaped(questions(12))
    answers = reference(lvlm, samples, "question_dpp", 1 / 4, positions)
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "max_model_len": 1024}
    with engine(
        tmp_path, enable_chunked_prefill=True, limit_mm_per_prompt={"image": 2}, **options
    ) as llm:
        match = compare(answers, ask(llm, samples))
        assert not match.wrong, match.line
        if name == "qwen3_vl":
            # It can fail: deeper layers matter. No cache has seen these questions.
            others = shaped(questions(12, 100))
            whole = reference(lvlm, others, "question_dpp", 1 / 4, positions)
            monkeypatch.setattr(QwenPruned, "packed", without_deep)
            assert len(compare(whole, ask(llm, others)).wrong) > 3
    unpruned = reference(lvlm, samples, "keep_all", 1.0)
    # pruning changes what is written
    assert len(compare(unpruned, [answer.ids for answer in answers]).wrong) > 6


def without_deep(self: QwenPruned, kept: Kept) -> Any:
    """What is cached where deeper layers get nothing of images."""
    assert kept.deep is not None
    return PACKED(self, kept._replace(deep=torch.zeros_like(kept.deep)))


def test_positions_beyond_what_the_language_model_knows(tmp_path: Path) -> None:
    """An image of 280 x 280 pixels takes 10 positions, however few of its tokens are kept."""
    name = "qwen2_5_vl"
    lvlm: FrozenLVLM = load_component(
        "model", name, pretrained=None, dtype="float32", geometry=GEOMETRY[name]
    )
    sample = questions(1)[0]
    sample = sample._replace(images=(sample.images[0].resize((280, 280)),))
    ids = lvlm.processed([sample])[0]["input_ids"]
    words = int((ids != lvlm.image_token).sum())
    lvlm.model.config.text_config.max_position_embeddings = words + 5
    export(tmp_path, lvlm, "divprune", 0.001)
    with (
        engine(tmp_path, max_model_len=words + 5) as llm,
        pytest.raises(
            VLLMValidationError,
            match=rf"position \d+ before pruning, and the language model knows {words + 5}",
        ),
    ):
        ask(llm, [sample])
