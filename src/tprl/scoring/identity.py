"""What tells models and data apart when results of theirs are stored: digests and plain values,
equal on every machine but for the times of files."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tprl.data import draws, image_files, images
from tprl.data.base import BaseDataset
from tprl.lvlm.base import BaseLVLM
from tprl.lvlm.recognition import ADAPTED

# another release may round or resize otherwise
LIBRARIES = ("tprl", "torch", "transformers", "pillow")
NAMES = ("name", "_target_")  # settings that name no file, whatever lies in the working directory
PICTURES = (draws, image_files, images)  # how draws and files become pictures
NUMBERS = 4096  # read of each tensor: any training changes some of them, and 14 GB need not be read


def of_lvlm(lvlm: BaseLVLM, config: Mapping[str, Any]) -> dict[str, Any]:
    """A frozen LVLM: its settings, weights, processor and tokenizer, and the kind of device that
    rounds its numbers."""
    # An adapter that works by hooks is not among the weights.
    adapted = getattr(getattr(lvlm, "model", None), ADAPTED, None)
    return {
        **({} if adapted is None else {"adapted": adapted}),
        "config": dict(config),
        "device": lvlm.device.type,
        "weights": of_weights(lvlm),
        "processor": of_processor(lvlm.processor),
        "code": of_code(lvlm),
        "libraries": {name: version(name) for name in LIBRARIES},
        # With torchvision transformers resizes by another algorithm: about one pixel in a hundred
        # differs.
        "torchvision": _installed("torchvision"),
        "pixels": _class_of(getattr(lvlm.processor, "image_processor", None)),
    }


def of_dataset(dataset: BaseDataset, config: Mapping[str, Any], split: str) -> dict[str, Any]:
    """A split: its settings, its length, and the files and folders that its settings name. Files in
    other places, such as images that rows name, are not looked at: where they were replaced, take
    another cache."""
    return {
        "config": dict(config),
        "split": split,
        "questions": len(dataset),
        "files": {
            name: of_path(str(config[name]))
            for name in config
            if name not in NAMES and _there(config[name])
        },
        "code": of_code(dataset),
        "images": _of_files(module.__file__ for module in PICTURES),
    }


def of_pruner(pruner: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A pruner: its settings, and the weights and the way of serving of a learned one."""
    learned = pruner.learned
    return {
        "config": dict(config),
        "weights": of_weights(learned),
        "serving": repr(learned.serving),
        "code": of_code(learned),
    }


def of_code(owner: Any) -> str:
    """Digest of the files that define an object's class and its bases."""
    files = {
        getattr(sys.modules.get(kind.__module__), "__file__", None) for kind in type(owner).__mro__
    }
    return _of_files(files)


def _of_files(files: Iterable[str | None]) -> str:
    """Digest of the contents of those files that are there."""
    paths = [Path(file) for file in sorted(filter(None, files))]
    return _digest(b"".join(path.read_bytes() for path in paths if path.is_file()))


def of_weights(owner: Any) -> str | None:
    """Digest of every tensor's name, type, shape and up to `NUMBERS` evenly spaced numbers, of a
    module or of the modules among an object's attributes; None where there is none."""
    parts = [] if owner is None else [owner, *vars(owner).values()]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    # Names, types and shapes are all read, of numbers only some.
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in chain.from_iterable(module.state_dict().items() for module in modules):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_meta:  # offloaded to disk by accelerate
            digest.update(_sampled(tensor))
    return digest.hexdigest() if modules else None


def of_processor(processor: Any) -> str | None:
    """Digest of a stock processor's settings, chat templates and vocabulary; None where there is
    none."""
    if processor is None:
        return None
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = sorted(tokenizer.get_vocab().items())
    templates = [getattr(part, "chat_template", None) for part in (processor, tokenizer)]
    settings = processor.to_json_string() if hasattr(processor, "to_json_string") else ""
    return _digest(json.dumps([settings, templates, vocabulary]).encode())


def _installed(package: str) -> str | None:
    """Its version; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _class_of(owner: Any) -> str | None:
    """Full name of an object's class: its settings may be equal where its code is not."""
    return None if owner is None else f"{type(owner).__module__}.{type(owner).__qualname__}"


def of_path(path: str) -> str:
    """Digest of names, sizes and times of a file or of all files in a folder; nothing is opened."""
    lines = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in _files(Path(path))]
    return _digest("\n".join(sorted(lines)).encode())


def _files(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    if path.is_file():
        yield path.name, path.stat()
    for folder, _, names in os.walk(path):
        for name in names:
            place = Path(folder, name)
            if place.exists():  # not a broken link
                yield str(place.relative_to(path)), place.stat()


def _there(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 1000 and Path(value).exists()


def _sampled(tensor: Tensor) -> bytes:
    # Evenly spaced, so that a change anywhere is likely seen; as bytes, nan included.
    flat = tensor.detach().flatten()
    numbers = flat[:: max(1, len(flat) // NUMBERS)].contiguous().cpu()
    return numbers.view(torch.uint8).numpy().tobytes()


def _digest(contents: bytes) -> str:
    return hashlib.blake2b(contents, digest_size=16).hexdigest()
