"""What the language model makes of a pack: one pass over many questions about one image."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.pretraining.packing import Pack
from tprl.pretraining.tiny_llava import TinyLlava


def read_packed(
    parts: TinyLlava,
    layers: slice,
    tokens: Float[Tensor, "B K D"],
    kept: Int[Tensor, "B K"],
    pack: Pack,
    total: int,
) -> tuple[Float[Tensor, "B C D"], tuple[Float[Tensor, "B H K K"], Float[Tensor, "B H C K1"]]]:
    """Hidden states of the text columns; attention to the visual tokens, of themselves in the lower
    layer and of the text in the upper one (with the first column of all before them).

    [prefix ; kept tokens] is shared, segments are blind to each other.

    Args:
        parts: the model and its processor.
        layers: the two whose attention is read.
        tokens: projected, those that are kept.
        kept: their raster indices.
        pack: its text.
        total: visual tokens of the image before any was dropped, so that text keeps its positions.
    """
    model = parts.llava.model.language_model
    embed, device = model.embed_tokens, tokens.device
    prefix = torch.tensor(parts.processor.tokenizer("USER:")["input_ids"], device=device)
    prefix = prefix.expand(len(tokens), -1)
    start, text = prefix.shape[1], pack.text.shape[1]
    image = slice(start, start + tokens.shape[1])

    # [prefix ; kept tokens ; text]; tokens and text stand where they would without pruning.
    embeds = torch.cat([embed(prefix), tokens, embed(pack.text)], 1)
    before = torch.arange(start, device=device).expand(len(tokens), -1)
    positions = torch.cat([before, kept + start, pack.offset + start + total], 1)
    seen = packed_mask(pack.segment, image.stop)
    # Additive: eager attention adds its mask, and adding a boolean one masks nothing.
    lowest = torch.finfo(tokens.dtype).min
    mask = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, lowest)

    # Attention of two layers, caught on its way: the model returns all layers or none.
    weights: list[Tensor] = []

    def keep_weights(module: object, inputs: object, output: tuple[Tensor, ...]) -> None:
        weights.append(output[1])

    attentions = [layer.self_attn for layer in model.layers[layers]]
    hooks = [attention.register_forward_hook(keep_weights) for attention in attentions]
    out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()

    # [B H C 1+K] of the text: to the start of the sequence, then to the visual tokens.
    rows = weights[1][:, :, -text:]
    upper = torch.cat([rows[..., :1], rows[..., image]], -1)
    return out.last_hidden_state[:, -text:], (weights[0][:, :, image, image], upper)


def packed_mask(segment: Int[Tensor, "B C"], prefix: int) -> Bool[Tensor, "B 1 S S"]:
    """Who may attend to whom: everything is causal, text sees the prefix and its own segment
    only."""
    full = F.pad(segment, (prefix, 0), value=-1)
    size = full.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    # Prefix columns have segment -1, which everybody may see.
    same = (full.unsqueeze(1) == full.unsqueeze(2)) | (full == -1).unsqueeze(1)
    return (same & causal).unsqueeze(1)
