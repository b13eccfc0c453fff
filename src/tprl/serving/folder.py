"""A folder that vLLM serves pruned: stock weights and config, our keys in it, the pruner beside
them."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import find_model
from tprl.pruners.learned import LearnedPruner, check_family, check_width
from tprl.runtime.files import write_atomically
from tprl.serving.names import rename_weights, with_vision_model
from tprl.serving.settings import FOLDER, Settings, check_servable, check_weights
from tprl.serving.template import with_bos
from tprl.types import Sample

log = logging.getLogger(__name__)
ARCHITECTURES = {
    "llava": "TPRLLlavaForConditionalGeneration",
    "qwen2_5_vl": "TPRLQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "TPRLQwen3VLForConditionalGeneration",
}
TEMPLATE = "chat_template.jinja"
# what a downloaded model has beside its weights
PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def check_export(lvlm: Any, pruner: Any, settings: Settings) -> None:
    """Refuse what vLLM could not serve, before anything is written.

    Raises:
        UserError: a family, a pruner or weights for which there is no class.
    """
    # The pruner alone, then whether it fits the model, then the model's own state.
    check_servable(pruner)
    kind = lvlm.model_type or lvlm.name
    if kind not in ARCHITECTURES:
        raise UserError(
            f"model={lvlm.name} is a {kind}, and target=vllm serves {', '.join(ARCHITECTURES)}: "
            "choose a model of these families."
        )
    check_family(pruner, lvlm)
    check_width(pruner, lvlm.width, lvlm.name)
    check_weights(lvlm)
    # The plugin turns keys by places of single tokens, which other kinds of RoPE do not have.
    rope = getattr(lvlm.model.config.text_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if settings.positions == "keep" and kind != "default":
        raise UserError(
            f"the language model of {lvlm.name} turns by rope_type={kind}, for "
            "which vLLM has no places of single tokens: use positions=compact."
        )


def write_folder(lvlm: FrozenLVLM, pruner: Any, settings: Settings, folder: Path) -> None:
    """Write what `vllm serve <folder>` needs.

    The folder still loads in transformers, bit-equal and unpruned.

    Args:
        lvlm: whose weights are written, in the dtype they have.
        pruner: written beside them where it has weights; else `settings.pruner` builds it again.
        settings: see `Settings`.
        folder: made if it does not exist.

    Raises:
        UserError: see `check_export`.
    """
    check_export(lvlm, pruner, settings)
    folder.mkdir(parents=True, exist_ok=True)
    # The config comes last: without our keys the folder is not taken for an export.
    lvlm.model.save_pretrained(folder)
    # vLLM's loader knows the tower's weights by another name.
    if lvlm.model_type == "llava":
        rename_weights(folder, with_vision_model)
    template = write_processor(lvlm, folder)
    check_wording(lvlm, template)
    if isinstance(pruner, LearnedPruner):
        pruner.save_pretrained(folder / FOLDER)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [ARCHITECTURES[lvlm.model_type]], **settings.keys}
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_processor(lvlm: FrozenLVLM, folder: Path) -> str:
    """Write tokenizer, image processor and chat template; returns the template.

    Raises:
        UserError: there is no chat template.
    """
    template = with_bos(lvlm.processor)
    if template is None:
        raise UserError(
            f"{lvlm.name} has no chat template, and chats "
            "are what an engine is asked: set one first."
        )
    # Parts that the tokenizer and image processor do not save are copied from the source.
    source = find_model(getattr(lvlm.model, "name_or_path", "") or "?")
    if getattr(lvlm.processor, "video_processor", "none") is not None:
        lvlm.processor.save_pretrained(folder)
    else:  # made without its video half, and then it cannot be saved whole
        _copy_processor(lvlm.processor, source, folder)
    write_atomically(folder / TEMPLATE, template)
    return template


def _copy_processor(processor: Any, source: Path, folder: Path) -> None:
    """The files of a downloaded model, or the parts that are there."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    for pattern in PROCESSOR_FILES if source.is_dir() else ():
        for path in source.glob(pattern):
            if not (folder / path.name).exists() and "index" not in path.name:
                shutil.copy(path, folder / path.name)


def check_wording(lvlm: FrozenLVLM, template: str) -> None:
    """Say so where the chat template words prompts otherwise than `model.prompt` does."""
    sample = Sample("wording", (), "what is it?", ())
    if lvlm.prompt is None:
        return
    ours = lvlm.render(sample)
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    # A sample without images: only the words around them can differ.
    stock = lvlm.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    if stock.removeprefix(lvlm.tokenizer.bos_token or "").strip() != ours.strip():
        log.warning(
            "the server words prompts by the chat template, not by model.prompt: %r, not %r",
            stock,
            ours,
        )


def settings_for(
    pruner: Any, node: Mapping[str, Any], keep_ratio: float, positions: str
) -> Settings:
    """Settings of an export; `node` is how a pruner without weights is built again."""
    return Settings(keep_ratio, positions, {} if isinstance(pruner, LearnedPruner) else node)
