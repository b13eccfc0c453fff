"""Published settings of real checkpoints, where the folder with them is at hand, and small models
that have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tprl.lvlm.blueprint import SCALE, byte_tokenizer

HOME = Path(__file__).resolve().parents[2]
PLACES = [HOME / up / "shared" / "real_configs" for up in ("..", "../..")]
REAL = next((place for place in PLACES if place.is_dir()), PLACES[0])
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published settings are not here")
CHECKPOINTS = {  # of each family: the model that reads it
    "llava-1.5-7b-hf": "llava",
    "llava-v1.6-vicuna-7b-hf": "llava_next",
    "Qwen2-VL-2B-Instruct": "qwen2_vl",
    "Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen3-VL-4B-Instruct": "qwen3_vl",
    "InternVL3-1B-hf": "internvl3",
    "SmolVLM2-2.2B-Instruct": "smolvlm2",
}
SMALL = {  # wherever a config names such a size
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_window_layers": 2,
}  # fmt: skip
SMALL_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "depth": 3, "num_heads": 4, "embed_dim": 32, "out_hidden_size": 48,
    "fullatt_block_indexes": [1], "projection_dim": 16, "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def described(name: str, target: Path, small: bool = False) -> PreTrainedTokenizerFast:
    """A folder laid out as the hub's, without weights: the published settings, templates, sizes and
    special tokens, and a tokenizer of bytes."""
    target.mkdir(parents=True)
    for file in FILES:
        if (REAL / name / file).is_file():
            shutil.copy(REAL / name / file, target / file)
    tokenizer = _tokenizer(json.loads((REAL / name / "tokenizer_config.json").read_text()))
    config = json.loads((REAL / name / "config.json").read_text())
    config = _numbered(_small(config, tokenizer) if small else config, tokenizer)
    (target / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(target)
    return tokenizer


def shrunk(name: str, target: Path) -> Path:
    """The same with a model of the same architecture that is small in width and depth: image sizes,
    patches and merges are the real ones."""
    tokenizer = described(name, target, small=True)
    config = (target / "config.json").read_text()
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(target))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(SCALE if weight.ndim > 1 else 1)
    ends = tokenizer.eos_token_id
    model.generation_config.update(
        eos_token_id=ends, bos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    # as it was published, fields of old versions included
    (target / "config.json").write_text(config)
    return target


def _tokenizer(settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Bytes for words, and the published special tokens."""
    special = [token["content"] for token in settings.get("added_tokens_decoder", {}).values()]
    extra = settings.get("extra_special_tokens")
    roles = extra if isinstance(extra, dict) else {}
    tokenizer = byte_tokenizer([token for token in special if token not in roles.values()], **roles)
    tokenizer.eos_token = settings["eos_token"]
    return tokenizer


def _small(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The config with small sizes."""
    # Qwen2.5-VL's config has the language model's sizes at the top
    flat = "text_config" not in config
    text = config if flat else config["text_config"]
    text |= {
        key: value
        for key, value in SMALL.items()
        if key in text or (not flat and key != "head_dim")
    }
    text["vocab_size"] = config["vocab_size"] = len(tokenizer)
    for rope in (text.get("rope_scaling"), text.get("rope_parameters")):
        if rope and "mrope_section" in rope:
            rope["mrope_section"] = [2, 2, 2]
    tower = config["vision_config"]
    tower |= {
        key: value
        for key, value in SMALL_TOWER.items()
        if key in tower or key in ("num_hidden_layers",)
    }
    if config["model_type"] in ("qwen2_vl",):
        tower["hidden_size"] = SMALL["hidden_size"]  # there it is the width after the merger
    return config


def _numbered(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The config with the ids of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    ids = {"image_token_id": _image(vocabulary), "image_token_index": _image(vocabulary)}
    marks = {
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "vision_token_id": "<|vision_pad|>",
    }
    ids |= {key: vocabulary[token] for key, token in marks.items() if token in vocabulary}
    config |= {key: value for key, value in ids.items() if key in config}
    for part in (config, config.get("text_config", {})):
        part |= {
            key: tokenizer.eos_token_id
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if key in part
        }
    return config


def _image(vocabulary: dict[str, int]) -> int:
    return next(
        vocabulary[token]
        for token in ("<image>", "<IMG_CONTEXT>", "<|image_pad|>")
        if token in vocabulary
    )
