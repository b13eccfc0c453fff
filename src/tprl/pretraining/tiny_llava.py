"""The embedded LVLM's blueprint: a stock LLaVA (CLIP ViT + projector + Llama) small enough to train
on two cores.

`build` makes untrained models, tokenizer and processor; `save` writes the folder that
`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` load, with the
CLIP model (the same vision tower, and the text tower it was trained with) in its subfolder `clip/`.
"""

import math
import re
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tprl.data.crowd import CROWD
from tprl.data.scenes import COLORS, SCENES, SHAPES, SIZES, World
from tprl.lvlm.blueprint import USER_ASSISTANT

PROMPT = "USER: <image>\n{question} ASSISTANT:"
DESCRIBE = "describe every object."
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
WORLDS = {world.name: world for world in (SCENES, CROWD)}
_PHRASES = (
    PROMPT.replace("<image>", "").format(question=DESCRIBE),
    "what color size shape is the object? is there a? how many objects are there? where is the?",
    "is the left or right of the above or below the? yes no a photo with and , .",
)


class TinyLlava(NamedTuple):
    """Everything `save` writes."""

    llava: LlavaForConditionalGeneration
    clip: CLIPModel
    processor: LlavaProcessor


def vocabulary(world: World = SCENES) -> list[str]:
    """Special tokens, then every word of the questions and captions, then the integers 0..side."""
    phrases = (*_PHRASES, "next to") if world is CROWD else _PHRASES
    words = list(chain.from_iterable(re.findall(r"\w+|[^\w\s]", phrase) for phrase in phrases))
    words += [*COLORS, *SHAPES, *SIZES, *(str(i) for i in range(world.side + 1))]
    return [*SPECIAL, *dict.fromkeys(words)]


def build_tokenizer(world: World = SCENES) -> PreTrainedTokenizerFast:
    """Word-level tokenizer: words, punctuation and whole numbers; anything else is <unk>."""
    ids = {word: i for i, word in enumerate(vocabulary(world))}
    # Whole words, so that a color is one token and can be told where to look.
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(
    world: str = "scenes",
    vision_width: int = 128,
    vision_layers: int = 6,
    patch: int = 8,
    width: int = 192,
    layers: int = 5,
    heads: int = 6,
    ffn: int = 512,
    clip_width: int = 64,
    seed: int = 0,
) -> TinyLlava:
    """Untrained models with weights drawn from `seed`; about 3.7 M parameters by default, (side /
    patch)^2 tokens."""
    # Weights depend on the seed alone, not on what drew random numbers before.
    torch.manual_seed(seed)
    side, tokenizer = WORLDS[world].side, build_tokenizer(WORLDS[world])
    ids = tokenizer.get_vocab()
    pad, bos, _, eos, image = (ids[token] for token in SPECIAL)
    marks: dict[str, Any] = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}

    # LLaVA: CLIP ViT, projector, Llama; features of the last layer but one.
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        projection_dim=clip_width,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        **marks,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image,
        vision_feature_layer=-2,
    )
    llava = LlavaForConditionalGeneration(config)
    # All patches begin where they are; row 0 is CLS.
    positions = llava.model.vision_tower.embeddings.position_embedding.weight
    positions.data[1:] = 0.3 * _sincos_2d(side // patch, vision_width)
    llava.generation_config.update(**marks)

    # CLIP's encoder of captions, which teaches the tower
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=clip_width,
        intermediate_size=4 * clip_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=clip_width,
        **marks,
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=clip_width))
    return TinyLlava(llava, clip, _processor(tokenizer, side, patch))


def _processor(tokenizer: PreTrainedTokenizerFast, side: int, patch: int) -> LlavaProcessor:
    square = {"height": side, "width": side}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=dict(square), do_convert_rgb=True),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=USER_ASSISTANT,
    )


def _sincos_2d(side: int, width: int) -> Float[Tensor, "N C"]:
    """Sines and cosines of row and column: where a patch is, known from the first step. With CLIP's
    own start (noise of 0.02) the tower had not learned where anything is after 250 steps."""
    angles = torch.arange(side).unsqueeze(1) * 100 ** (-torch.arange(width // 4) / (width // 4))
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], 1)


def load(folder: Path) -> TinyLlava:
    """What `save` wrote, in float32: a warm start for more training."""
    return TinyLlava(
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
        CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32),
        LlavaProcessor.from_pretrained(folder),
    )


def carried_over(source: TinyLlava, target: TinyLlava) -> TinyLlava:
    """`target` with the weights of `source`, a model of another world: words keep their embeddings,
    positions are interpolated between patches; words and numbers that `source` did not know keep
    what `target` drew.
    """
    words = source.processor.tokenizer.get_vocab()
    # Rows of the embeddings that both vocabularies have: (in the target, in the source).
    wanted = target.processor.tokenizer.get_vocab()
    common = [(i, words[word]) for word, i in wanted.items() if word in words]
    new, old = map(torch.tensor, zip(*common, strict=True))
    # Equal shapes are copied; of the others positions are interpolated, the rest is by word.
    for name in ("llava", "clip"):
        weights = getattr(target, name).state_dict()
        for key, value in getattr(source, name).state_dict().items():
            if value.shape == weights[key].shape:
                weights[key] = value
            elif "position_embedding" in key:
                weights[key] = _interpolated(value, len(weights[key]))
            else:
                weights[key][new] = value[old]
        getattr(target, name).load_state_dict(weights)
    return target


def _interpolated(positions: Float[Tensor, "N C"], count: int) -> Float[Tensor, "M C"]:
    """Position embeddings of CLS and of a square of patches, for a square of another side."""
    old, new = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
    # [1 C side side], resampled, and flat again.
    square = positions[1:].T.unflatten(1, (old, old)).unsqueeze(0)
    square = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def save(folder: Path, parts: TinyLlava) -> None:
    """Write fp16 safetensors, configs, tokenizer and processor; `clip/` gets LLaVA's vision tower
    weights.

    The models themselves are fp16 afterwards.
    """
    parts.clip.vision_model.load_state_dict(parts.llava.model.vision_tower.state_dict())
    parts.llava.half().save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    parts.clip.half().save_pretrained(folder / "clip")
    parts.processor.tokenizer.save_pretrained(folder / "clip")
