"""The stock model inside what others put around it: adapters, compilers, parallel runs."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tprl.errors import UserError

# Attributes by which wrappers that are no modules themselves show what they hold.
INSIDE = ("module", "model", "base_model", "_orig_mod")


def stock_model(model: Any) -> Any:
    """The stock model whose `generate` a wrapper calls in the end; a stock model itself as it is.

    A wrapper that is a module (of peft, `torch.compile`, DataParallel, DistributedDataParallel,
    Lightning or one's own) holds exactly one stock model that generates. Hooks of accelerate are no
    wrapper: they stay on the model.

    Raises:
        UserError: the wrapper changes prompts or shards weights, so that what is pruned would not
            be what it runs.
    """
    if isinstance(model, PreTrainedModel):
        return model
    # What the wrapper itself does to prompts or weights comes before what it holds.
    kind = type(model).__name__
    _refuse_sharded(model, kind)
    _refuse_prompt_learning(model, kind)
    inside = _outermost(model)
    if len(inside) > 1:
        names = ", ".join(type(inner).__name__ for inner in inside)
        raise UserError(
            f"{kind} holds {len(inside)} models that generate "
            f"({names}): give prune the one to be pruned."
        )
    if not inside:
        return model  # no wrapper that we know: family_of says what is missing
    return inside[0]


def _outermost(model: Any) -> list[Any]:
    """Stock models that generate in a wrapper, less those that are parts of another one."""
    # Engines and trainers hold their model under one of a few names, perhaps wrapped again.
    if not isinstance(model, nn.Module):
        parts = [
            part for name in INSIDE if isinstance(part := getattr(model, name, None), nn.Module)
        ]
        candidates: dict[int, Any] = {}
        for part in parts:
            models = [part] if _generates(part) else _outermost(part)
            candidates |= {id(model): model for model in models}
        return list(candidates.values())
    models = []
    covered: set[int] = set()
    for module in model.modules():  # parents first
        if id(module) not in covered and _generates(module):
            models.append(module)
            covered |= {id(part) for part in module.modules()}
    return models


def _generates(module: Any) -> bool:
    return isinstance(module, PreTrainedModel) and module.can_generate()


def _refuse_sharded(model: Any, kind: str) -> None:
    """Weights in pieces are whole only inside the forward of the wrapper."""
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    for name in [type(module).__name__ for module in modules]:
        if name in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            of = "" if name == kind else f" in {kind}"
            raise UserError(
                f"{name}{of} shards the weights, and generate of the model inside reads "
                "them whole: load the model on its own, or with device_map, and prune that."
            )


def _refuse_prompt_learning(model: Any, kind: str) -> None:
    """peft's prompt, prefix and p-tuning put tokens of their own before the embeddings that
    `generate` is given."""
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    for module in modules:
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if getattr(config, "is_prompt_learning", False):
                raise UserError(
                    f"adapter {name!r} of {kind} is a {type(config).__name__}, "
                    "which writes tokens of its own into the prompt: prune a "
                    "model without it, or with adapters of weights such as LoRA."
                )
