"""How a folder of weights is laid out: whether it can be read at all, asked before anything is
loaded."""

from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedConfig

from tprl.errors import UserError

# layouts of the authors' own code, and checkpoints of the same weights that transformers reads
CONVERTED = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "internvl_chat": "OpenGVLab/InternVL3-2B-hf",
}
# a tokenizer's file, by what kind it is of
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# fields of LLaVA's own config
LLAVA_OWN = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type")


def check_layout(source: str, name: str, model_type: str) -> None:
    """Refuse weights that stand in another layout, belong to another family, or have no readable
    tokenizer.

    No code of a checkpoint is ever run: what needs some is refused here.

    Args:
        source: a folder or hub id.
        name: of the model, for errors.
        model_type: of the stock config that `name` reads.

    Raises:
        UserError: with the checkpoint or the package that would do.
        OSError: there is no config.
    """
    # From the most telling reason to the least: own layouts also differ in their type.
    config, _ = PreTrainedConfig.get_config_dict(source)
    if not config:
        raise OSError(f"{source} has no config.json")
    kind = config.get("model_type", "unknown")
    if any(field in config for field in LLAVA_OWN) and "text_config" not in config:
        raise _converted(
            source, "LLaVA's own layout", CONVERTED.get(model_type, CONVERTED["llava"])
        )
    if kind == "internvl_chat":
        raise _converted(source, "InternVL's own layout (its code is never run)", CONVERTED[kind])
    if kind != model_type and "auto_map" in config:
        raise UserError(
            f"the weights '{source}' ({kind}) need code from their folder, "
            "which TPRL never runs: use a checkpoint that transformers "
            "reads itself, such as those whose names end in -hf."
        )
    if kind != model_type:
        raise UserError(
            f"the weights '{source}' are of type {kind}, and model={name} reads "
            f"{model_type}: choose the model that fits them{_named(kind)}."
        )
    _check_tokenizer(Path(source), source)


def _converted(source: str, layout: str, checkpoint: str) -> UserError:
    return UserError(
        f"the weights '{source}' are in {layout}, which transformers does not "
        f"read: use the converted checkpoint, e.g. model.pretrained={checkpoint}."
    )


def _named(kind: str) -> str:
    """The models that read weights of a type; "" where none does."""
    from tprl.build import choices, target_of  # late: it imports every family

    known = [
        name
        for name in choices("model")
        if getattr(target_of("model", name), "model_type", None) == kind
    ]
    fitting = [name for name in known if name != "tiny_llava"]
    return f", model={fitting[0]}" if fitting else ""


def _check_tokenizer(folder: Path, source: str) -> None:
    """A folder may have a SentencePiece file alone, or no tokenizer at all, for which some stock
    classes make an empty one."""
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(
            f"the folder '{source}' has no tokenizer ({TOKENIZERS[0]}): download the checkpoint "
            "whole."
        )
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return
    if find_spec("sentencepiece") is None:
        raise UserError(
            f"the tokenizer of '{source}' is a tokenizer.model alone, and "
            "reading it needs the package sentencepiece: pip install "
            "sentencepiece, or copy the checkpoint's tokenizer.json beside it."
        )
