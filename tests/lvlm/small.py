"""A LLaVA of the stock class with small random weights, scaled up so that errors show, and
questions for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from tprl.build import choices, load_component, target_of
from tprl.data.scenes import Scenes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import Look
from tprl.pretraining.tiny_llava import TinyLlava, build, save
from tprl.types import Encoded, TokenSelection

TOKENS = 36
# of the configs of a small vision tower (CLIP or SigLIP) and of a small language model (Llama)
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def families() -> tuple[str, ...]:
    """A config of every family that a stock class stands behind."""
    result: dict[str, str] = {}
    for name in choices("model"):
        target = target_of("model", name)
        if issubclass(target, FrozenLVLM) and name != "tiny_llava":
            result.setdefault(target.model_type, name)
    return tuple(result.values())


# Those that generic tests run on by default; later ones are slow there, and each has cheap tests of
# its own (test_later_families.py).
FIRST = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl3", "smolvlm2")


def each_family(*without: str) -> list[Any]:
    """`families` as parameters of tests, but for some."""
    names = (name for name in families() if name not in without)
    return [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in names]


DATA = Scenes("val")
SAMPLES = [DATA[i] for i in range(15)]  # three images, five questions of different lengths each


def save_folder(lvlm: FrozenLVLM, folder: Path) -> None:
    """The folder that a user would have downloaded."""
    lvlm.model.save_pretrained(folder)
    # its video half is missing: the parts are saved
    if lvlm.processor.__class__.__name__ == "ImageOnly":
        lvlm.tokenizer.chat_template = lvlm.processor.chat_template
        lvlm.tokenizer.save_pretrained(folder)
        lvlm.processor.image_processor.save_pretrained(folder)
    else:
        lvlm.processor.save_pretrained(folder)


def half_on_disk(lvlm: FrozenLVLM, folder: Path) -> FrozenLVLM:
    """The same model, half of it in memory and the rest on disk."""
    save_folder(lvlm, folder)
    result = load_component(
        "model",
        lvlm.name,
        pretrained=str(folder),
        dtype="float32",
        max_new_tokens=6,
        placement="shard",
        max_memory={"cpu": f"{(folder / 'model.safetensors').stat().st_size // 2000}KB"},
        offload_folder=str(folder / "offload"),
    )
    assert {"cpu", "disk"} == set(result.model.hf_device_map.values())
    return result


def small_parts() -> TinyLlava:
    """A small random model whose matrices are scaled up, so that wrong masks and positions show in
    the logits."""
    parts = build(
        vision_width=32,
        vision_layers=3,
        patch=16,
        width=48,
        layers=2,
        heads=4,
        ffn=64,
        clip_width=16,
    )
    with torch.no_grad():
        for weight in parts.llava.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    return parts


def write_small(where: Path) -> None:
    parts = small_parts()
    with torch.no_grad():
        # so that some answers end early
        parts.llava.lm_head.weight[parts.processor.tokenizer.eos_token_id] *= 3
    save(where, parts)


def random_selection(encoded: Encoded, share: float = 0.3, seed: int = 0) -> TokenSelection:
    draws = torch.rand(encoded.visual_mask.shape, generator=torch.Generator().manual_seed(seed))
    return TokenSelection(keep=encoded.visual_mask & (draws < share))


def random_look(n: int) -> Look:
    """What a layer of the Llama kind gets: two prompts with n visual tokens each, the second
    shorter by three words."""
    torch.manual_seed(n)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=8
    )
    layer, norm = (
        LlamaDecoderLayer(config, 0).requires_grad_(False),
        LlamaRMSNorm(32).requires_grad_(False),
    )
    hidden, first = torch.randn(2, 2, n + 15, 32)
    column, start = torch.arange(n + 15).expand(2, -1), torch.tensor([[0], [3]])
    real, visual, nothing = column >= start, (column >= 5) & (column < 5 + n), column < 0
    cos, sin = LlamaRotaryEmbedding(config)(hidden, (column - start).clamp(min=0))
    return Look(
        layer,
        norm,
        hidden,
        first,
        real,
        visual,
        torch.zeros_like(column),
        nothing,
        nothing,
        cos,
        sin,
    )
