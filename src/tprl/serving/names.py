"""Names of weights as an engine's loader knows them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from tprl.runtime.files import replacing, write_atomically

TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
INDEX = "model.safetensors.index.json"


def with_vision_model(name: str) -> str:
    """A CLIP or SigLIP tower's weight with `vision_model.` in its name, which transformers 5 leaves
    out, vLLM 0.32 needs, and transformers reads both ways. Other names stay."""
    return TOWER.sub(r"\1vision_model.", name)


def rename_weights(folder: Path, rename: Callable[[str], str]) -> int:
    """Rename the weights of a saved model, file by file, values untouched; returns how many."""
    changed = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            names = {name: rename(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            if all(old == new for old, new in names.items()):
                continue
            weights = {new: file.get_tensor(old) for old, new in names.items()}
        changed += sum(old != new for old, new in names.items())
        # What is cut short must not look complete.
        with replacing(path) as temporary:
            save_file(weights, temporary, metadata=metadata)
    # The index names weights too, where there are several files.
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return changed
