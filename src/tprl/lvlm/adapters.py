"""LoRA adapters: folders that `stage=tune` writes and peft reads, added to a stock model.

    y = W x + scale * B A x        (LoRA, Hu et al. 2021, arXiv 2106.09685)

A model of our own gets them merged into W; one that somebody else owns gets them as hooks, so that
it can be given back exactly.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tprl.errors import UserError
from tprl.lvlm.recognition import ADAPTED, model_print, print_of
from tprl.runtime.files import Damaged, read_sealed, write_sealed

FOLDER = "adapter"  # of a run
WEIGHTS, CONFIG, ABOUT = "adapter_model.safetensors", "adapter_config.json", "tprl_adapter.json"
PREFIX = "base_model.model."  # which peft puts before the names of modules
# Settings of peft with which an adapter is more than the formula above.
BEYOND = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "velora_config", "kasa_config"),
)


class Pair(NamedTuple):
    """What is added to one linear layer: scale * up @ down."""

    down: Float[Tensor, "R I"]
    up: Float[Tensor, "O R"]


class Adapter(NamedTuple):
    """An adapter as it lies in its folder."""

    folder: Path
    pairs: Mapping[str, Pair]  # by the name of the module
    scale: float
    about: Mapping[str, Any]  # what it was trained on and how; empty where peft alone wrote it

    @property
    def print(self) -> str:
        """Digest of its weights."""
        tensors = {f"{name}.{i}": pair[i] for name, pair in self.pairs.items() for i in (0, 1)}
        return print_of(tensors)


def write_adapter(
    folder: Path,
    pairs: Mapping[str, Pair],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Write a folder that `read_adapter` and `peft.PeftModel.from_pretrained` read; each file is
    complete or not there.

    Args:
        pairs: by the name of the module.
        config: of peft, as plain values.
        about: what it was trained on: "print" and "model" of the model before, and whatever else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The names and types of peft: float32 on the CPU, whatever the model computes in.
    tensors = {}
    for name, pair in pairs.items():
        for part, tensor in (("lora_A", pair.down), ("lora_B", pair.up)):
            tensors[f"{PREFIX}{name}.{part}.weight"] = tensor.detach().float().cpu().contiguous()
    write_sealed(folder / WEIGHTS, save(tensors))
    write_sealed(folder / CONFIG, json.dumps(dict(config), indent=1) + "\n")
    write_sealed(folder / ABOUT, json.dumps(dict(about), indent=1) + "\n")


def read_adapter(source: object) -> Adapter:
    """The adapter in a folder, or in `adapter/` of a run.

    Raises:
        UserError: that is no path, there is none, it is damaged, or it is no plain LoRA.
    """
    if not isinstance(source, str | Path):
        raise UserError(
            f"adapter must be a run of stage=tune or its adapter/, got {source!r}; use e.g. "
            "adapter='runs/tuned'."
        )
    # A run holds its adapter in a folder; a bare adapter is the folder.
    places = [Path(source) / FOLDER, Path(source)]
    folder = next((place for place in places if (place / CONFIG).is_file()), None)
    if folder is None or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{source} holds no adapter ({CONFIG} and {WEIGHTS}): give the directory that "
            "python -m src.train stage=tune printed as `run:`."
        )
    try:
        config = json.loads(read_sealed(folder / CONFIG))
        # peft alone writes no record of ours, and its adapters are read all the same.
        about = json.loads(read_sealed(folder / ABOUT)) if (folder / ABOUT).is_file() else {}
        tensors = load(read_sealed(folder / WEIGHTS))
        scale = config["lora_alpha"] / config["r"]
    except (Damaged, ValueError, KeyError, TypeError, ArithmeticError, SafetensorError) as error:
        raise UserError(
            f"{folder} is damaged ({error}): copy it again, or train it again."
        ) from error
    # Anything beyond the formula would be dropped in silence, so it is refused.
    strange = [name for name in BEYOND if config.get(name)]
    unread = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if config.get("peft_type") != "LORA" or strange or unread:
        what = ", ".join(strange or unread[:1] or [str(config.get("peft_type"))])
        raise UserError(
            f"{folder} is more than a plain LoRA ({what}): load it with peft, and give tprl.prune "
            "the model that peft returns."
        )
    # Both halves of each pair must be there: a single half adds nothing.
    names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    pairs = {}
    for name in names:
        down, up = (tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if down is None or up is None:
            raise UserError(f"{folder} is damaged (half of {name} is missing): copy it again.")
        pairs[name] = Pair(down, up)
    return Adapter(folder, pairs, scale, about)


def check_adapter(adapter: Adapter, model: Any) -> None:
    """Refuse an adapter that was trained on another model.

    Raises:
        UserError: it was, or a layer of its is not there or has other sizes.
    """
    # Equal shapes do not make an adapter fit: the weights below it must be the same.
    made_for = adapter.about.get("print")
    if made_for is not None and made_for != model_print(model):
        raise UserError(
            f"{adapter.folder} was trained on other weights than this model's (on "
            f"{adapter.about.get('model')}): load those, or train one for this model by "
            "`python -m src.train stage=tune model=...`."
        )
    # An adapter without a record is checked by names and sizes alone.
    modules = dict(model.named_modules())
    for name, pair in adapter.pairs.items():
        layer = modules.get(name)
        sizes = (pair.down.shape[1], pair.up.shape[0])
        fault = None
        if layer is None:
            fault = "missing"
        elif not isinstance(layer, nn.Linear):
            fault = "no linear layer"
        elif (layer.in_features, layer.out_features) != sizes:
            fault = "of another size"
        if fault is not None:
            raise UserError(
                f"{adapter.folder} does not fit this model: {name} is {fault}; use the model that "
                "it was trained on."
            )


def merge_adapter(model: Any, source: str | Path) -> None:
    """Add an adapter to a stock model for good: into its weights, and by hooks where weights cannot
    be changed (quantized and offloaded ones).

    Args:
        source: its folder, or a run of stage=tune.

    Raises:
        UserError: no adapter there, or one of another model.
    """
    adapter, adapted = _fitting(model, source)
    for layer, pair in _layers(model, adapter):
        weight = layer.weight
        if weight.is_floating_point() and not weight.is_meta:
            # Summed in float32 and rounded once, to the type of the weight.
            added = adapter.scale * (pair.up.to(weight.device) @ pair.down.to(weight.device))
            with torch.no_grad():
                weight.copy_(weight.float() + added)
        else:
            layer.register_forward_hook(_hook(pair, adapter.scale))
    setattr(model, ADAPTED, adapted)


def add_adapter(model: Any, source: str | Path) -> Callable[[], None]:
    """Add an adapter to a stock model by hooks; what is returned takes them off again, and the
    model is exactly what it was.

    Args:
        source: as for `merge_adapter`.

    Raises:
        UserError: as `merge_adapter`.
    """
    adapter, adapted = _fitting(model, source)
    before = getattr(model, ADAPTED, None)
    handles = []
    for layer, pair in _layers(model, adapter):
        handles.append(layer.register_forward_hook(_hook(pair, adapter.scale)))
    setattr(model, ADAPTED, adapted)

    def take_off() -> None:
        for handle in handles:
            handle.remove()
        if before is None:
            delattr(model, ADAPTED)
        else:
            setattr(model, ADAPTED, before)

    return take_off


def _fitting(model: Any, source: str | Path) -> tuple[Adapter, str]:
    """An adapter that fits this model, and by what the model with it is recognized: the model
    before, plus the adapter."""
    adapter = read_adapter(source)
    check_adapter(adapter, model)
    # The print is read before merging, which changes the weights that it is made of.
    return adapter, f"{model_print(model)}+{adapter.print}"


def _layers(model: Any, adapter: Adapter) -> Iterator[tuple[nn.Linear, Pair]]:
    modules = dict(model.named_modules())
    for name, pair in adapter.pairs.items():
        yield modules[name], pair


def _hook(pair: Pair, scale: float) -> Callable[..., Tensor]:
    """A forward hook that adds scale * up @ down @ x to what a layer makes of x."""
    moved = dict[torch.device, Pair]()

    def added(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        # A model may be spread over devices; each device gets a copy at its first call.
        if x.device not in moved:
            moved[x.device] = Pair(pair.down.to(x.device), pair.up.to(x.device))
        down, up = moved[x.device]
        # In float32 as it was trained, then in the type of the layer.
        return output + (scale * (x.float() @ down.T @ up.T)).to(output.dtype)

    return added
