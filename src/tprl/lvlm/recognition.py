"""By what calibrations and adapters recognize the model that they belong to."""

import hashlib
from typing import Any

import torch
from torch import Tensor

SAMPLED = 64  # numbers that are read of each parameter
ADAPTED = "tprl_adapted"  # on a model with an adapter: its print before, and that of the adapter


def model_print(model: Any) -> str:
    """Digest of a stock model's parameters: names, shapes, and some numbers rounded to bfloat16, so
    that the same weights in another float type have the same one. Quantized weights have another.

    A model to which an adapter was added by `adapters` is the model before, and the adapter. One
    that is no module, such as the toy, goes by its name.
    """
    if not hasattr(model, "named_parameters"):
        return f"{model.name} of width {model.width}"
    return getattr(model, ADAPTED, None) or print_of(dict(model.named_parameters()))


def print_of(tensors: dict[str, Tensor]) -> str:
    """The same digest of tensors by name, in any order."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_meta:  # offloaded to disk by accelerate
            digest.update(_sampled(tensor))
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    # Evenly spaced; rounding to bfloat16 is the same from float32 and from float16 of one number.
    flat = tensor.detach().flatten()
    numbers = flat[:: max(1, len(flat) // SAMPLED)].cpu()
    if numbers.is_floating_point():
        numbers = numbers.bfloat16()
    return numbers.contiguous().view(torch.uint8).numpy().tobytes()
