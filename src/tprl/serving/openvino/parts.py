"""The parts of a pruned model as modules of plain tensors, one prompt at a time, made to be
traced."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tprl.policy.dpp import unit_features
from tprl.policy.networks import PolicyInput
from tprl.pruners.learned import LearnedPruner


def on_cpu(lvlm: Any, pruner: nn.Module) -> None:
    """Bring both to where graphs are traced, in float32: example inputs are made there."""
    lvlm.model.cpu().float()
    lvlm.device = torch.device("cpu")
    pruner.cpu().float().eval()


class Eyes(nn.Module):
    """Pixels [1 3 H W] -> visual tokens [1 N D]: vision tower and projector of a LLaVA."""

    def __init__(self, lvlm: Any) -> None:
        super().__init__()
        self.tower, self.projector = (
            lvlm.model.model.vision_tower,
            lvlm.model.model.multi_modal_projector,
        )
        # The strategy "default" drops the CLS token, which comes first.
        config = lvlm.model.config
        self.layer = config.vision_feature_layer
        self.skip = int(config.vision_feature_select_strategy == "default")

    def forward(self, pixels: Tensor) -> Tensor:
        # hidden[0] is the embedding, so the layer counts from 1 or from the end.
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        return self.projector(hidden[self.layer][:, self.skip :])


class Words(nn.Module):
    """Token ids [1 S] -> embeddings [1 S D]."""

    def __init__(self, lvlm: Any) -> None:
        super().__init__()
        self.table = lvlm.model.get_input_embeddings()

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class Policy(nn.Module):
    """Tokens [1 N D], their centers [1 N 2], words [1 Q D] and the keep ratio [1] -> logits [1 N],
    and what the diversity kernel is made of [1 N Z]."""

    def __init__(self, pruner: LearnedPruner) -> None:
        super().__init__()
        self.pruner = pruner

    def forward(
        self, tokens: Tensor, xy: Tensor, words: Tensor, ratio: Tensor
    ) -> tuple[Tensor, Tensor]:
        autoencoder = self.pruner.autoencoder
        # As `LearnedPruner.observe`: codes feed the network and, by default, the diversity kernel.
        codes = tokens if autoencoder is None else autoencoder.encode(tokens)
        # Made of the inputs, so that a trace holds no shape.
        seen, read = torch.ones_like(tokens[..., 0]) > 0, torch.ones_like(words[..., 0]) > 0
        logits = self.pruner.net(PolicyInput(codes, xy, seen, words, read), seen, 0, ratio)[0]
        return logits, unit_features(
            codes if self.pruner.serving.kernel == "codes" else tokens, seen
        )


class Language(nn.Module):
    """Embeddings [1 S D], positions [1 S], what is added to attention logits [1 1 S T], and keys
    and values of T - S earlier tokens -> logits [1 V] after the last one, and all keys and
    values."""

    def __init__(self, lvlm: Any) -> None:
        super().__init__()
        self.model, self.head = lvlm.model.model.language_model, lvlm.model.lm_head

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        # Inputs of a trace are tensors: the cache is built inside, and taken apart again below.
        cache = cache_of(past)
        out = self.model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        # Keys and values alternate by layer, in the order in which `past` brought them.
        states: list[Tensor] = []
        for layer in cache.layers:
            assert isinstance(layer, DynamicLayer)  # `cache_of` makes no other ones
            assert layer.keys is not None
            assert layer.values is not None
            states += [layer.keys, layer.values]
        return self.head(out.last_hidden_state[:, -1]), *states


def cache_of(past: Sequence[Tensor]) -> DynamicCache:
    """Keys and values of all layers, in turn, as transformers holds them."""
    cache = DynamicCache()
    for keys, values in zip(past[0::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        # A layer that counts as initialized appends to these tensors instead of starting empty.
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache
