"""The layers that `stage=tune` adapts, and adapters put into them by peft."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from tprl.errors import UserError
from tprl.kinds import typed
from tprl.lvlm.adapters import Adapter
from tprl.runtime.packages import need_package

# Linear layers of decoders, and the modules between vision tower and language model, by the names
# that stock classes give them.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECODERS = ("language_model", "text_model")
PROJECTORS = ("multi_modal_projector", "merger", "connector")


def injected(model: Any, rank: int, alpha: float, projector: bool, seed: int) -> Any:
    """Adapters in a stock model, which add nothing yet: W x + alpha / rank * B A x, with B = 0.

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685), equation 3, by peft.

    Args:
        model: whose linear layers get them in place: those of the decoder.
        rank: rows of A and columns of B.
        alpha: their weight, times the rank.
        projector: whether the layers between vision tower and language model get them, too.
        seed: of A.

    Returns:
        peft's wrapper, whose `unload` gives the model back.

    Raises:
        UserError: peft is missing, or the model has no layers by the names that we know.
    """
    need_package("peft", "tune", "stage=tune")
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    # Heads and embeddings stay: answers are read with the model's own words.
    pattern = rf"model\.({'|'.join(DECODERS)})\..*\.({'|'.join(LINEAR)})"
    if projector:
        pattern += rf"|model\.(.*\.)?({'|'.join(PROJECTORS)})(\..*)?"
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name):
            layers.append(name)
    if not layers:
        raise UserError(
            f"stage=tune finds no layers to adapt in {type(model).__name__}: use a model with a "
            "decoder of linear layers, e.g. model=llava."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # annotated so, and only divided by the rank
        target_modules=layers,
        lora_dropout=0.0,
        bias="none",
    )
    # The start is the same whatever drew before.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoraModel(model, {"default": config}, "default")


def check_form(adapter: Adapter, key: str, settings: Mapping[str, Any]) -> None:
    """Refuse to go on from an adapter by settings that would make another function of it.

    Args:
        key: what options of this stage begin with.
        settings: `rank`, `alpha` and `projector` among them.

    Raises:
        UserError: one of these is another than the adapter's.
    """
    rank = max(pair.down.shape[0] for pair in adapter.pairs.values())
    parts = {part for name in adapter.pairs for part in name.split(".")}
    form = {
        "rank": rank,
        "alpha": adapter.scale * rank,
        "projector": not parts.isdisjoint(PROJECTORS),
    }
    different = [name for name, value in form.items() if settings[name] != value]
    if different:
        asked = " ".join(f"{key}.{name}={typed(settings[name])}" for name in different)
        remedy = " ".join(f"{key}.{name}={typed(form[name])}" for name in different)
        raise UserError(f"{adapter.folder} was not trained with {asked}: give {remedy}.")


def no_stock(name: Any) -> UserError:
    """The error for an LVLM that is none of transformers' models."""
    return UserError(
        f"stage=tune adapts a stock language model, and {name} has none: use model=tiny_llava."
    )


def parameters_of(model: Any) -> list[tuple[str, nn.Parameter]]:
    """Those of the adapters, by name."""
    return [(name, weight) for name, weight in model.named_parameters() if ".lora_" in name]
