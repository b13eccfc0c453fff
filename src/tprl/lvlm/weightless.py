"""A frozen LVLM without its weights, on the meta device: what it reads, how it is laid out and what
it costs, in seconds and without memory."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tprl.lvlm.batching import check_template
from tprl.lvlm.blueprint import random_model
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layouts import check_layout
from tprl.lvlm.loading import Placement, explained, find_model


def weightless(family: type[FrozenLVLM], options: Mapping[str, Any]) -> FrozenLVLM:
    """A model of a family as `options`, the arguments of its class, describe it. It can neither see
    nor answer.

    Raises:
        UserError: the folder or hub id cannot be read, or options that cannot be.
    """
    name, pretrained = options.get("name") or family.model_type, options["pretrained"]
    where = Placement(options.get("dtype") or "float32", "meta")
    if pretrained is None:
        model, processor = random_model(family.blueprint, options.get("geometry") or {}, where)
    else:
        model, processor = _described(family, name, pretrained, where)
    # What `FrozenLVLM.__init__` sets, in the same order.
    processor.tokenizer.padding_side = "left"
    lvlm = family.around(model.requires_grad_(False).eval(), processor)
    lvlm.name, lvlm.prompt = name, check_template(options.get("prompt"))
    lvlm.micro_batch = options.get("micro_batch") or 64
    lvlm.max_new_tokens = options.get("max_new_tokens") or 16
    lvlm.length_is_set = bool(options.get("max_new_tokens"))
    lvlm.limit(options.get("max_pixels"), options.get("max_tiles"))
    return lvlm


def _described(
    family: type[FrozenLVLM], name: str, pretrained: str, where: Placement
) -> tuple[Any, Any]:
    """Model and processor of a folder or hub id."""
    source = str(folder) if (folder := find_model(pretrained)).is_dir() else pretrained
    with explained(source, name):
        check_layout(source, name, family.model_type)
        processor = family.load_processor(source)
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config, dtype=where.dtype)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:  # there need be none: the config's own tokens end answers then
        model.generation_config = GenerationConfig.from_model_config(config)
    return model, processor
