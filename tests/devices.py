"""GPUs that are not there: every tensor is one on the CPU with a note of the device where it would
be.

Inside `Machine()` devices such as cuda:1 can be named, moved to and asked for. What a machine with
GPUs refuses is refused with its words, and what makes it wait for a GPU is counted.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from time import perf_counter
from typing import Any, Self
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from torch._functorch import vmap
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from tprl.lvlm.frozen import FrozenLVLM

HOST = torch.device("cpu")
# Reading a number, or asking for a result whose size depends on numbers, waits until the GPU has
# computed them.
WAITING = {
    *(
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "is_nonzero",
    ),
    *(
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
        "equal",
        "allclose",
    ),
    # these look whether they have succeeded
    *("linalg_cholesky", "linalg_eigh", "linalg_inv", "linalg_solve"),
}
MOVING = {"to", "cpu", "cuda", "type_as"}
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
# these take tensors of several devices
ANYWHERE = {"copy_", "set_", "_has_compatible_shallow_copy_type"}
JOINING = {"cat", "stack", "concat"}  # these take no lone number of the host among tensors of a GPU
AS_THEY_ARE = {"__repr__", "__format__", "__reduce_ex__", "untyped_storage", "data_ptr"}


def place(tensor: Tensor) -> torch.device:
    """Where a tensor would be; asked outside of a `Machine` too."""
    return vars(tensor).get("emulated", HOST)


def put(tensor: Tensor, device: torch.device) -> None:
    tensor.emulated = device  # type: ignore[attr-defined]


def device_of(name: Any) -> torch.device:
    """A device by any of its names; without a number it is the first of its kind."""
    device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    return (
        torch.device(device.type, device.index or 0)
        if device.type == "cuda"
        else torch.device(device.type)
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def line_of_tprl() -> str:
    """The innermost line of the package that is being executed."""
    frame = sys._getframe(1)
    while frame.f_back is not None and "/src/tprl/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/src/')[2]}:{frame.f_lineno}"


def _noted(wrap: Any) -> Any:
    """What vmap wraps a tensor in, or takes out of it, is where the tensor is."""

    def wrapped(tensor: Tensor, *how: int) -> Tensor:
        out = wrap(tensor, *how)
        put(out, place(tensor))
        return out

    return wrapped


class Event:
    """A point in the work of an emulated GPU, which is done as soon as it is queued."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine

    def record(self, stream: Any) -> None:
        self.time = perf_counter()

    def synchronize(self) -> None:
        self.machine._wait()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


class Machine(TorchFunctionMode):
    """While it is entered, a machine with as many GPUs as are named. `waits` counts by line of the
    package."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = Counter[str]()

    def __enter__(self) -> Self:
        self.patches = ExitStack()
        for owner, name, value in (
            (torch.accelerator, "synchronize", lambda *_: self._wait()),
            (torch.cuda, "Event", lambda **_: Event(self)),
            (torch.cuda, "current_stream", lambda *_: None),
            # Transformers makes masks by vmap, which wraps and unwraps tensors past this class.
            (vmap, "_add_batch_dim", _noted(vmap._add_batch_dim)),
            (vmap, "_remove_batch_dim", _noted(vmap._remove_batch_dim)),
        ):
            self.patches.enter_context(patch.object(owner, name, value))
        # What a checkpoint computes again is compared in shape and dtype: notes of devices get lost
        # where the engine keeps a tensor.
        checks = checkpoint._allowed_determinism_checks_to_fns
        alike = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
        self.patches.enter_context(patch.dict(checks, alike))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patches.close()
        super().__exit__(*error)

    def _wait(self) -> None:
        self.waits[line_of_tprl()] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return device_of(args[0]) if len(args) == 1 else func(*args, **kwargs)
        if name in ("__get__", "__set__"):
            return self._attribute(func, args)
        if name in AS_THEY_ARE:
            return func(*args, **kwargs)
        if name == "get_device":
            return -1 if place(args[0]) == HOST else place(args[0]).index
        if name == "backward":
            return self._backward(*args, **kwargs)
        if name in MOVING:
            return self._move(name, *args, **kwargs)
        if kwargs.get("device") is not None:
            return self._create(func, args, kwargs)
        operands = list(tensors_in([args, kwargs]))
        home = self._indexed(name, args) if name in INDEXING else self._together(name, operands)
        self._note_wait(name, args, kwargs, operands)
        if home != HOST and name in ("numpy", "__array__"):
            raise TypeError(
                f"can't convert {home} device type tensor to numpy, at {line_of_tprl()}"
            )
        return self._settle(func(*args, **kwargs), home, operands)

    def _backward(self, tensor: Tensor, gradient: Any = None, **how: Any) -> None:
        """With the emulation on: layers may be computed again on the way back. The public functions
        would only ask this class again."""
        gradient = torch.ones_like(tensor) if gradient is None else gradient
        steps = bool(how.get("retain_graph") or how.get("create_graph"))
        TorchFunctionMode.__enter__(self)
        try:
            _engine_run_backward(
                (tensor,),
                (gradient,),
                steps,
                bool(how.get("create_graph")),
                tuple(how.get("inputs") or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def _settle(self, out: Any, home: torch.device, operands: list[Tensor]) -> Any:
        """Note the device of what is new in a result."""
        known = set(map(id, operands))
        for tensor in tensors_in(out):
            if id(tensor) not in known and tensor.device.type != "meta":
                put(tensor, home)
        return out

    def _attribute(self, func: Any, args: Any) -> Any:
        tensor, attribute = args[0], func.__self__.__name__
        if tensor.device.type == "meta":
            return func(*args)
        match attribute, func.__name__:
            case "device", _:
                return place(tensor)
            case (("is_cuda" | "is_cpu"), _):
                return place(tensor).type == attribute.removeprefix("is_")
            case "data", "__set__":
                func(*args)
                put(tensor, place(args[1]))
                return None
        return self._settle(func(*args), place(tensor), [tensor])

    def _create(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        device = device_of(kwargs["device"])
        out = func(*args, **{**kwargs, "device": HOST if device.type == "cuda" else device})
        return self._settle(out, device, [])

    def _move(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = after = place(tensor)
        words = {"cpu": [HOST], "cuda": list(args) or ["cuda"]}.get(
            name, [*args, kwargs.pop("device", None)]
        )
        how: dict[str, Any] = {key: kwargs[key] for key in ("dtype", "copy") if key in kwargs}
        for number, word in enumerate(words):
            if isinstance(word, Tensor):
                after, how["dtype"] = place(word), word.dtype
            elif isinstance(word, torch.dtype):
                how["dtype"] = word
            elif isinstance(word, torch.device | str) or (number == 0 and type(word) is int):
                after = device_of(word)
        if after.type == "meta":
            return tensor.to("meta", **how)
        if before != after:
            how["copy"] = True
        if before != HOST and after == HOST:
            self._wait()
        return self._settle(tensor.to(HOST, **how), after, [tensor])

    def _together(self, name: str, operands: list[Tensor]) -> torch.device:
        """Where a function computes; a number of the host goes with everything."""
        joining = name in JOINING
        places = {place(x): x for x in operands if x.ndim > 0 or place(x) != HOST or joining}
        if len(places) > 1 and name not in ANYWHERE:
            raise self._refused(name, places)
        return place(operands[0]) if name in ANYWHERE else next(iter(places), HOST)

    def _indexed(self, name: str, args: Any) -> torch.device:
        """An index may come from the host, values that are written only as a single number."""
        tensor, index, *values = args
        home = place(tensor)
        foreign = {place(x) for x in tensors_in(index)} - {home, HOST}
        foreign |= {place(x) for x in tensors_in(values) if x.ndim > 0 or place(x) != HOST} - {home}
        if foreign:
            raise self._refused(name, {home, *foreign})
        return home

    def _refused(self, name: str, places: Any) -> RuntimeError:
        names = ", ".join(sorted(map(str, places)))
        return RuntimeError(
            "Expected all tensors to be on the same device, "
            f"got {names} in {name} at {line_of_tprl()}"
        )

    def _note_wait(
        self, name: str, args: Any, kwargs: dict[str, Any], operands: list[Tensor]
    ) -> None:
        if all(place(x) == HOST for x in operands):
            return
        masks = (
            [x for x in tensors_in(args[1:2]) if x.dtype == torch.bool] if name in INDEXING else []
        )
        lengths = name == "repeat_interleave" and len(operands) > 1 and "output_size" not in kwargs
        if name in WAITING or lengths or any(place(x) != HOST for x in masks):
            self._wait()


def parts_of(model: nn.Module) -> Iterator[tuple[str, list[Tensor], bool]]:
    """What of a model may lie on different devices, by name, in order; and whether it is a block,
    which is whole. So is a module around a single leaf: accelerate cuts it only where the leaf does
    not fit."""
    whole: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in whole):
            continue
        if isinstance(module, nn.ModuleList):
            whole += [f"{name}.{number}" for number in range(len(module))]
        if name in whole:
            yield name, [*module.parameters(), *module.buffers()], True
        elif len([*module.modules()]) <= 2 and not isinstance(module, nn.ModuleList):
            whole.append(name)
            yield name, [*module.parameters(), *module.buffers()], False
        else:
            yield from (
                (f"{name}.{weight}", [x], False)
                for weight, x in module.named_parameters(recurse=False)
            )


def cut(lvlm: FrozenLVLM, count: int, words: int = -1) -> None:
    """Spread a model over so many emulated GPUs by accelerate's hooks, as `placement=shard` does:
    every block on another one than the block before, what follows a block with it, and embeddings
    of words on the last GPU, or on number `words`."""
    model, where, block = lvlm.model, dict[str, int](), 0
    homes: dict[int, int] = {}  # of weights, which modules may share
    for name, tensors, is_block in parts_of(model):
        block += is_block
        usual = words % count if name.endswith("embed_tokens") else block % count
        where[name] = next((homes[id(tensor)] for tensor in tensors if id(tensor) in homes), usual)
        for tensor in tensors:
            homes[id(tensor)] = where[name]
            put(tensor, device_of(where[name]))
    remove_hook_from_submodules(model)  # it may have been cut before
    dispatch_model(model, where, skip_keys=model._skip_keys_device_placement, force_hooks=True)
    model.hf_device_map = where
    lvlm._hold(model, lvlm.processor, lvlm.name)


def live_on(lvlm: FrozenLVLM, device: torch.device) -> None:
    """Put a whole model on one emulated GPU, as a rank with a copy of its own does; no hook moves
    what it is given."""
    for tensor in (*lvlm.model.parameters(), *lvlm.model.buffers()):
        put(tensor, device)
    lvlm._hold(lvlm.model, lvlm.processor, lvlm.name)
