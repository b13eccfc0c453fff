"""The stock processor of a checkpoint, also where `AutoProcessor` cannot build it."""

from typing import Any

from transformers import PreTrainedConfig

from tprl.build import choices, target_of
from tprl.errors import UserError


def load_processor(source: str) -> Any:
    """What `AutoProcessor.from_pretrained(source)` returns, for images and text, without
    torchvision.

    `AutoProcessor` builds the video half too, which needs torchvision on Qwen-VL, InternVL and
    SmolVLM; this one leaves it out. What older checkpoints leave out of a LLaVA's processor is
    filled in from the model's config.

    Args:
        source: a folder or hub id.

    Raises:
        UserError: no processor is there, or TPRL does not know the architecture.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
        if not config:
            raise OSError(f"{source} has no config.json")
    except OSError as error:
        raise UserError(
            f"'{source}' is neither a folder with a config.json nor within reach on the hub."
        ) from error
    # The family by its config alone: importing it costs less than building the wrong processor.
    kind = config.get("model_type", "unknown")
    classes = [target_of("model", name) for name in choices("model")]
    fitting = [family for family in classes if getattr(family, "model_type", None) == kind]
    if not fitting:
        known = sorted({family.model_type for family in classes if hasattr(family, "model_type")})
        raise UserError(
            f"'{source}' is a {kind}, and TPRL knows {', '.join(known)}: use AutoProcessor."
        )
    return fitting[0].load_processor(source)
