"""Small random models of a family's architecture (`model.pretrained=null`): what tests and dry runs use."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SCALE = 6.0  # at the usual 0.02 logits are near uniform, and a wrong position or mask goes unnoticed
USER_ASSISTANT = (
    "{% for turn in messages %}{{ turn.role | upper }}: {% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)


def byte_tokenizer(special: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of any text without a vocabulary file: one token per byte.

    Args:
        special: tokens that are never split, beside the four usual ones.
        roles: their names in the tokenizer, such as image_token="<image>".
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
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
    pad, bos, eos = token_ids(tokenizer, "<pad>", "<s>", "</s>")
    model.generation_config.update(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    return model
