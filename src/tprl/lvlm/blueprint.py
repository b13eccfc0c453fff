"""Random models of a family's architecture (`model.pretrained=null`): small ones for tests and dry
runs, or with the sizes of a published one (`geometry=...`) to be timed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tprl.errors import UserError
from tprl.lvlm.loading import Placement

# The language model of every small build, as the arguments that all stock configs share: wide
# enough for four heads, of which two share keys, so that grouped attention is exercised.
SMALL_TEXT: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SMALL_CLIP: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
# at the usual 0.02 logits are near uniform, and a wrong position or mask goes unnoticed
SCALE = 6.0
USER_ASSISTANT = (
    "{% for turn in messages %}{{ turn.role | upper }}: {% for part "
    "in turn.content %}{% if part.type == 'image' %}<image>\n{% else "
    "%}{{ part.text }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)


def byte_tokenizer(special: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of any text without a vocabulary file: one token per byte.

    Args:
        special: tokens that are never split, beside the four usual ones.
        roles: their names in the tokenizer, such as image_token="<image>".
    """
    # Without merges every byte stays a token of its own, so any text has ids.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=roles,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*special, *roles.values()]})
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast, *names: str) -> list[int]:
    """Ids of special tokens."""
    return [tokenizer.get_vocab()[name] for name in names]


def random_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with its matrices scaled up, and generation ending where the tokenizer says."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(SCALE if weight.ndim > 1 else 1)
    # Stock defaults would name ids of another vocabulary.
    pad, bos, eos = token_ids(tokenizer, "<pad>", "<s>", "</s>")
    model.generation_config.update(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    return model


def random_model(
    blueprint: Callable[[], tuple[Any, Any]], geometry: Mapping[str, Any], where: Placement
) -> tuple[Any, Any]:
    """The blueprint's model and its processor, or a larger model of the same architecture.

    Args:
        blueprint: see `FrozenLVLM.blueprint`.
        geometry: fields of the stock config that differ from the blueprint's (nested), and under
            `processor` and `image_processor` attributes of these that must fit them; see
            conf/geometry. Empty: none.
        where: dtype, device and attention; large weights are drawn on the device.

    Raises:
        UserError: a field that the processor or the config does not have.
    """
    # what is drawn later depends on the run's seed, not on this one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = blueprint()
        if geometry:
            model = _resized(model, processor, dict(geometry), where)
    model.to(where.device, where.dtype)
    if where.attention is not None:
        model.set_attn_implementation(where.attention)
    return model, processor


def _resized(small: Any, processor: Any, sizes: dict[str, Any], where: Placement) -> Any:
    for part, name in ((processor, "processor"), (processor.image_processor, "image_processor")):
        for field, value in sizes.pop(name, {}).items():
            _need(field, hasattr(part, field), name)
            setattr(part, field, value)
    # A model is built anew: the blueprint's weights have other shapes.
    config = type(small.config).from_dict(_merged(small.config.to_dict(), sizes))
    with where.device:  # where drawing billions of numbers takes the least time
        resized = type(small)._from_config(config, dtype=where.dtype)
    resized.generation_config = small.generation_config
    return resized


def _merged(old: dict[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`old` with the fields of `new`, nested."""
    merged = dict(old)
    for field, value in new.items():
        _need(f"{path}{field}", field in old, "config")
        nested = isinstance(value, Mapping) and isinstance(old[field], dict)
        merged[field] = _merged(old[field], value, f"{path}{field}.") if nested else value
    return merged


def _need(field: str, known: bool, what: str) -> None:
    if not known:
        raise UserError(
            f"model.geometry names {field}, which this architecture's {what} does not have: leave "
            "it out."
        )
