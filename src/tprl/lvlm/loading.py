"""Where a model's weights come from, and where the model goes."""

import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    ProcessorMixin,
)

from tprl.errors import UserError
from tprl.lvlm.layouts import check_layout
from tprl.runtime.hub import within_reach
from tprl.runtime.packages import need_package

log = logging.getLogger(__name__)
IMAGES = "preprocessor_config.json"
ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Placement:
    """How weights are loaded, and where they go.

    Args:
        dtype: name of a torch dtype.
        device: "auto" is the visible GPU whose number is this process's rank, else the CPU.
        placement: "replicate": a copy on this process's device. "shard": one copy over all GPUs,
            the rest in memory and on disk (accelerate's device_map); the policy and its rollouts
            are on the first device.
        attention: "sdpa", "flash_attention_2" or "eager"; None is what transformers chooses.
        load_in: "8bit" or "4bit" (bitsandbytes); None loads the weights as they are.
        max_memory: shard only, how much each device may hold, such as {0: 20GiB, cpu: 60GiB}.
        offload_folder: shard only, where weights go that fit nowhere.

    Raises:
        UserError: an unknown value, a package that is missing, or shard in a run of several
            processes.
    """

    def __init__(
        self,
        dtype: str,
        device: str = "auto",
        placement: str = "replicate",
        attention: str | None = None,
        load_in: str | None = None,
        max_memory: dict[int | str, str] | None = None,
        offload_folder: str | None = None,
    ) -> None:
        # Values first, then packages, then what does not go together.
        allowed = {"placement": ("replicate", "shard"), "load_in": (None, "8bit", "4bit")}
        allowed["attention"] = (None, "sdpa", "flash_attention_2", "eager")
        for name, value in (
            ("placement", placement),
            ("load_in", load_in),
            ("attention", attention),
        ):
            if value not in allowed[name]:
                known = ", ".join(str(choice or "null") for choice in allowed[name])
                raise UserError(f"model.{name} must be one of {known}, got {value}.")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"model.dtype must be float32, bfloat16 or float16, got {dtype}.")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.shard, self.attention, self.load_in = placement == "shard", attention, load_in
        self.max_memory, self.offload_folder = max_memory, offload_folder
        if self.shard:
            need_package("accelerate", "shard", "model.placement=shard")
        if load_in is not None:
            need_package("bitsandbytes", "quant", f"model.load_in={load_in}")
        if self.shard and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "model.placement=shard puts one copy over all GPUs, and this run has "
                "several processes: set trainer.devices=1, or model.placement=replicate."
            )
        # Of several processes on a machine each has the GPU of its local rank.
        place = torch.device("cpu")
        if torch.cuda.is_available():
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        self.device = place if device == "auto" else torch.device(device)

    def arguments(self) -> dict[str, Any]:
        """For `from_pretrained`."""
        arguments: dict[str, Any] = {"dtype": self.dtype}
        if self.attention is not None:
            arguments["attn_implementation"] = self.attention
        # Quantized weights cannot be moved after loading: they are placed at once.
        if self.load_in is not None:
            kind = {
                "8bit": {"load_in_8bit": True},
                "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": self.dtype},
            }
            arguments |= {
                "quantization_config": BitsAndBytesConfig(**kind[self.load_in]),
                "device_map": {"": self.device},
            }
        elif self.device.type == "cuda" and find_spec("accelerate") is not None:
            # Straight to the GPU: n processes of a machine would otherwise hold n copies in its
            # memory first.
            arguments |= {"device_map": {"": self.device}}
        if self.shard:
            # accelerate writes into it
            memory = None if self.max_memory is None else dict(self.max_memory)
            arguments |= {
                "device_map": "auto",
                "max_memory": memory,
                "offload_folder": self.offload_folder,
            }
        return arguments

    def check_random(self, name: str) -> None:
        """Refuse what only applies to weights that are loaded."""
        if self.shard or self.load_in is not None:
            raise UserError(
                "model.placement=shard and model.load_in are for weights that "
                f"are loaded, and model={name} model.pretrained=null makes "
                "small random ones: set model.pretrained, or leave them out."
            )


def first_device(model: Any) -> torch.device:
    """Where a model's inputs go: its device, or the first one of a model spread over several."""
    places = [place for place in getattr(model, "hf_device_map", {}).values() if place != "disk"]
    if places:
        return torch.device(places[0])
    if model.device.type != "meta":
        return model.device
    # Offloaded by hooks of accelerate alone: weights are away until a module runs, where its hook
    # says.
    running = map(_hooked_to, model.modules())
    return torch.device(next((device for device in running if device is not None), "cpu"))


def _hooked_to(module: Any) -> Any:
    """Where a hook of accelerate moves what a module gets, if it has one."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


def module_device(module: Any, tensor: torch.Tensor) -> torch.device:
    """Where a module computes: where a hook moves what it gets, else where this tensor is."""
    device = _hooked_to(module)
    return tensor.device if device is None else torch.device(device)


def find_model(pretrained: str) -> Path:
    """The folder of a model: one that ships with TPRL, the `model/` of a pretraining run, or the
    path itself."""
    places = [ASSETS / pretrained, Path(pretrained) / "model"]
    return next((place for place in places if (place / "config.json").is_file()), Path(pretrained))


@contextmanager
def explained(source: str, name: str) -> Generator[None, None, None]:
    """What is raised while `model=<name>` is loaded from a folder or hub id, as one sentence.

    Raises:
        UserError: whatever was raised.
    """
    try:
        if not within_reach(source):
            raise OSError(f"{source} is neither a folder nor cached, and the hub does not answer")
        yield
    except UserError:
        raise
    except ImportError as error:  # before OSError: a package that is missing, such as flash_attn
        raise UserError(
            f"model={name} cannot be loaded with these "
            f"options: {str(error).strip().splitlines()[0]}"
        ) from error
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise _incomplete(Path(source), name, error) from error
        if "safetensors" in str(error):
            raise UserError(
                f"the weights '{source}' are not in safetensors, and TPRL unpickles nothing: use "
                "a checkpoint that has model.safetensors."
            ) from error
        raise UserError(
            f"model={name} needs the weights '{source}', and they are neither a local folder "
            "nor within reach on the hub: set model.pretrained=/path/to/a/downloaded/folder, "
            "or use model=tiny_llava, which ships with TPRL."
        ) from error
    except (SafetensorError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A file that is cut off, or tensors of other shapes: the copy is at fault, not an option.
        if isinstance(error, SafetensorError):
            raise _damaged(source, name, lines[0]) from error
        if "mismatch" in str(error).lower():
            raise _damaged(source, name, "their shapes do not fit") from error
        raise UserError(f"model={name} cannot be loaded with these options: {lines[0]}") from error


def load(
    source: str, name: str, model_type: str, where: Placement, load_processor: Callable[[str], Any]
) -> tuple[Any, Any]:
    """Model and processor of `model=<name>`.

    Raises:
        UserError: nothing there or within reach, weights of another family than `model_type`, or
            damaged ones.
    """
    with explained(source, name):
        check_layout(source, name, model_type)
        processor = load_processor(source)
        arguments = where.arguments()
        # The report on loading tells weights that are missing.
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, output_loading_info=True, use_safetensors=True, **arguments
        )
    model, info = loaded
    if info["missing_keys"]:  # transformers would go on with random weights in their place
        raise _damaged(source, name, f"{min(info['missing_keys'])} is not there")
    return (model if "device_map" in arguments else model.to(where.device)), processor


def clip_settings(config: Any) -> dict[str, Any]:
    """What of a LLaVA's processor decides how many placeholders it writes for a crop."""
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),  # CLS
    }


def completed(processor: Any, source: str) -> Any:
    """A LLaVA's processor with what its files leave out, from the model's config; older ones leave
    out much, and stock defaults then stand for other models."""
    written, _ = type(processor).get_processor_dict(source)
    for name, value in clip_settings(AutoConfig.from_pretrained(source)).items():
        if written.get(name) is None and getattr(processor, name) != value:
            log.info(
                "the processor in %s has no %s: %s, as the model's config says", source, name, value
            )
            setattr(processor, name, value)
    return processor


def _incomplete(folder: Path, name: str, error: Exception) -> UserError:
    """What is said of a folder that is there and cannot be loaded."""
    if not (folder / "config.json").is_file():
        kind = "Mistral's own layout" if (folder / "params.json").is_file() else "no config.json"
        why = f"there is {kind}, and transformers reads a config.json"
    elif not any(folder.glob("*.safetensors")):
        why = "there is a config.json, and no weights (*.safetensors)"
    elif "image processor" in str(error) and not (folder / IMAGES).is_file():
        why = f"there is no {IMAGES}, which says how images are prepared"
    else:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"model={name} cannot load the folder '{folder}': {why}: download the checkpoint whole, or "
        "set model.pretrained=null for a small model with random weights."
    )


def _damaged(source: str, name: str, reason: str) -> UserError:
    return UserError(
        f"the weights of {name} in {source} are damaged ({reason}): copy the folder again."
    )


class WithoutVideo(ProcessorMixin):
    """Before a stock processor among the bases: it then accepts None for its video half, which
    cannot be built where torchvision is missing, and for one that hears."""

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        # SmolVLM's own asks the video half for its settings first, whatever the conversation shows.
        return ProcessorMixin.apply_chat_template(self, *args, **options)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name in ("video_processor", "feature_extractor") and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)


def processor_parts(processor_class: type[Any], source: str) -> tuple[Any, Any, str | None]:
    """Image processor, tokenizer and chat template in a folder or at a hub id."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    template = tokenizer.chat_template
    if template is None:  # then in a file of its own
        template = processor_class.get_processor_dict(source)[0].get("chat_template")
    return AutoImageProcessor.from_pretrained(source, backend="pil"), tokenizer, template


def image_only(processor_class: type[Any], source: str, **options: Any) -> Any:
    """A processor `WithoutVideo`, from its parts in a folder or at a hub id."""
    images, tokenizer, template = processor_parts(processor_class, source)
    return processor_class(images, tokenizer, None, chat_template=template, **options)
