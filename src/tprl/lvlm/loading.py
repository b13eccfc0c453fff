"""Where a model's weights come from, and where the model goes."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, ProcessorMixin

from tprl.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the visible GPU whose number is this process's rank, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def find_model(pretrained: str) -> Path:
    """The folder of a model: one that ships with TPRL, the `model/` of a pretraining run, or the path itself."""
    places = [ASSETS / pretrained, Path(pretrained) / "model"]
    return next((place for place in places if (place / "config.json").is_file()), Path(pretrained))


def load(source: str, name: str, dtype: torch.dtype, load_processor: Callable[[str], Any]) -> tuple[Any, Any]:
    """Model and processor of `model=<name>`.

    Raises:
        UserError: nothing there or within reach, or damaged weights.
    """
    try:
        if not _within_reach(source):
            raise OSError(f"{source} is neither a folder nor cached, and the hub does not answer")
        processor = load_processor(source)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model={name} needs the weights '{source}', and they are neither a local folder nor within reach on the "
            f"hub: set model.pretrained=/path/to/a/downloaded/folder, or use model=tiny_llava, which ships with TPRL."
        ) from error
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, SafetensorError) else "their shapes do not fit"
        raise _damaged(source, name, reason) from error
    model, found = loaded
    if found["missing_keys"]:  # transformers would go on with random weights in their place
        raise _damaged(source, name, f"{min(found['missing_keys'])} is not there")
    return model, processor


def _within_reach(source: str) -> bool:
    """Whether loading can succeed at all. Asked first, because the hub's client retries for long without a network."""
    if Path(source).is_dir():
        return True
    try:
        if isinstance(try_to_load_from_cache(source, "config.json"), str):
            return True
    except HFValidationError:
        return False
    if HF_HUB_OFFLINE:
        return False
    if getproxies():  # only the client can tell
        return True
    hub = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((hub.hostname or "", hub.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _damaged(source: str, name: str, reason: str) -> UserError:
    return UserError(f"the weights of {name} in {source} are damaged ({reason}): copy the folder again.")


class WithoutVideo(ProcessorMixin):
    """Before a stock processor among the bases: it then accepts None for its video half, which cannot be built where
    torchvision is missing."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)
