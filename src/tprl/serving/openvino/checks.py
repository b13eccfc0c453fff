"""What has a graph in OpenVINO, and what `answer.py` can rebuild in numpy; nothing here needs
OpenVINO."""

from typing import Any

from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.llava import feature_layers
from tprl.pruners.learned import LearnedPruner, check_family, check_width
from tprl.serving.settings import check_servable, check_weights

BICUBIC = (3, "bicubic")  # as Pillow and as torchvision call it
# of `runtime.Answerer.pixels`
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
SIDES = ({"shortest_edge"}, {"height", "width"})  # what a size may name
ELSEWHERE = "use target=vllm"


def check_convert(lvlm: FrozenLVLM, pruner: Any) -> None:
    """Refuse what has no graph here, before anything is written.

    Raises:
        UserError: another family than LLaVA-1.5, another tower than CLIP, several feature layers,
            weights that are quantized or spread, a processor that `answer.py` does not rebuild, no
            end token, or a pruner that is no policy of this model.
    """
    check_servable(pruner)
    if lvlm.model_type != "llava":
        raise UserError(
            f"model={lvlm.name} is a {lvlm.model_type}, and target=openvino "
            f"converts llava alone: {ELSEWHERE}, or a LLaVA-1.5."
        )
    if not isinstance(pruner, LearnedPruner) or pruner.serving.select not in ("dpp", "topk"):
        how = f" with select={pruner.serving.select}" if isinstance(pruner, LearnedPruner) else ""
        raise UserError(
            f"pruner {pruner.name}{how} has no graph for OpenVINO: use "
            "a policy that selects by dpp or topk, such as pruner=tprl."
        )
    check_family(pruner, lvlm)
    check_width(pruner, lvlm.width, lvlm.name)
    check_weights(lvlm)
    check_tower(lvlm)
    check_processor(lvlm)
    if not lvlm.ends:
        raise UserError(
            f"the generation config of {lvlm.name} has no eos_token_id, so no answer "
            "would end: write it into the checkpoint's generation_config.json."
        )


def check_tower(lvlm: FrozenLVLM) -> None:
    """Refuse a tower whose tokens are not the patches of one layer of a CLIP.

    Raises:
        UserError: it is one.
    """
    config = lvlm.model.config
    kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if kind != "clip_vision_model" or strategy != "default":
        raise UserError(
            f"{lvlm.name} selects the features of its {kind} by {strategy!r}, and target=openvino "
            f"converts a clip_vision_model without its CLS token ('default'): {ELSEWHERE}."
        )
    if len(layers := feature_layers(config)) != 1:
        raise UserError(
            f"{lvlm.name} puts the features of layers {layers} side by side, and "
            f"target=openvino converts one vision_feature_layer: {ELSEWHERE}."
        )


def check_processor(lvlm: FrozenLVLM) -> None:
    """Refuse a processor that does something else to images and texts than `runtime.Answerer` does.

    Raises:
        UserError: it names the setting.
    """
    images, side = lvlm.processor.image_processor, lvlm.model.config.vision_config.image_size
    odd = [f"{step}=False" for step in STEPS if not getattr(images, step, False)]
    if getattr(images, "do_pad", False):
        odd.append("do_pad=True")
    resample = getattr(images, "resample", None)
    if getattr(resample, "value", resample) not in BICUBIC:
        odd.append(f"resample={resample}")
    if abs(255 * (getattr(images, "rescale_factor", None) or 0) - 1) > 1e-6:
        odd.append(f"rescale_factor={getattr(images, 'rescale_factor', None)}")
    size, crop = sides(getattr(images, "size", None)), sides(getattr(images, "crop_size", None))
    if set(size) not in SIDES:
        odd.append(f"size={size}")
    if crop != {"height": side, "width": side}:
        odd.append(f"crop_size={crop}")
    if odd:
        raise UserError(
            f"the image processor of {lvlm.name} has {odd[0]}, and the program "
            f"of target=openvino resizes by bicubic, crops to the {side} x "
            f"{side} pixels of the tower and normalizes: {ELSEWHERE}."
        )
    if not getattr(lvlm.tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {lvlm.name} has no tokenizer.json, "
            f"which the program of target=openvino reads: {ELSEWHERE}."
        )


def sides(size: Any) -> dict[str, int]:
    """The sides that a size of an image processor names; of a mapping or of transformers'
    SizeDict."""
    return {name: value for name, value in dict(size or {}).items() if value is not None}
