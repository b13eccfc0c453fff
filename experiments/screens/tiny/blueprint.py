"""The blueprint of `tiny_screens`: a stock LLaVA that reads pages of 320 x 320 pixels as 400
tokens.

Its sizes are stock fields; two things are special at the start only. The patch embedding begins as
a cosine transform, which loses little of a patch, and three layers of the tower begin by looking at
neighboring patches, as a convolution does. Text of 12 pixels lies across the borders of patches,
and from CLIP's own start most of the first hours go into finding the neighbors.
"""

import math
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
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

from tprl.lvlm.blueprint import USER_ASSISTANT
from tprl.pretraining.tiny_llava import TinyLlava

SIDE = 320  # pixels
PATCH = 16
CELLS = SIDE // PATCH
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
SIGNS = "?:.,'\"&$%+-/()!"
SPACE = "▁"  # what a token begins with that begins a word
# Numbers side by side are coordinates, a token each; other numbers are read digit by digit.
PIECES = (
    rf"(?<=\d){SPACE}\d{{1,3}}|{SPACE}\d{{1,3}}(?={SPACE}\d)|{SPACE}?\d|"
    rf"{SPACE}?[a-z]+|{SPACE}?[^{SPACE}]|{SPACE}"
)
WAVES = 8  # frequencies of the position code, per axis
PERIOD = 24  # patches; above CELLS, so that the far side is not taken for a neighbor
RING = [(0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]  # (rows, columns)
LINE = [(0, -1), (0, 1), (0, -2), (0, 2), (-1, 0), (1, 0), (0, -3), (0, 3)]
# amplitude of position codes: a text's contrast must not decide how well its place is known
LOUD = 4.0
FOCUS = (
    0.7  # gain of position codes in queries and keys: most of a head's attention is at its neighbor
)


@cache
def words() -> tuple[str, ...]:
    """Words with a token of their own; others are spelled."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def vocabulary() -> list[str]:
    """Special tokens, single characters with and without a space before them, words,
    coordinates."""
    single = [*LETTERS, *DIGITS, *SIGNS]
    spaced = [SPACE + character for character in single]
    whole = [SPACE + word for word in (*words(), "user", "assistant")]
    numbers = [f"{SPACE}{number}" for number in range(10, SIDE + 1)]
    return [*SPECIAL, SPACE, *single, *spaced, *dict.fromkeys(whole), *numbers]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case words, else letters; coordinates as whole numbers, other numbers as digits."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordPiece(ids, unk_token="<unk>", continuing_subword_prefix=""))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+$"), ""),
            normalizers.Replace(Regex(r"^\s*|\s+"), SPACE),
            normalizers.Replace(Regex(f"{SPACE}+"), SPACE),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
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
    vision_width: int = 256,
    vision_layers: int = 7,
    vision_heads: int = 8,
    vision_ffn: int = 768,
    width: int = 256,
    layers: int = 5,
    heads: int = 8,
    ffn: int = 512,
    clip_width: int = 64,
    neighbors: bool = True,
    seed: int = 0,
) -> TinyLlava:
    """Untrained models with weights drawn from `seed`.

    Args:
        vision_width, vision_layers, vision_heads, vision_ffn: of the tower; the last layer is
            CLIP's alone.
        width, layers, heads, ffn: of the language model.
        clip_width: of CLIP's text tower and its embedding.
        neighbors: start with a cosine transform and with attention to neighbors, else as CLIP does.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pad, bos, _, eos, image = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    special = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=vision_ffn,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=clip_width,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=clip_width,
        intermediate_size=4 * clip_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=clip_width,
        **special,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special,
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=language,
            image_token_index=image,
            vision_feature_layer=-2,
            tie_word_embeddings=True,
        )
    )
    smooth_numbers(llava.get_input_embeddings().weight, tokenizer)
    llava.generation_config.update(**special)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=clip_width))
    if neighbors:
        see_neighbors(llava.model.vision_tower)
    return TinyLlava(llava, clip, _processor(tokenizer))


@torch.no_grad()
def smooth_numbers(embedding: Float[Tensor, "vocab D"], tokenizer: PreTrainedTokenizerFast) -> None:
    """Coordinates begin with embeddings that are alike where they are."""
    ids = number_ids(tokenizer)
    angles = torch.arange(SIDE + 1).unsqueeze(1) * 2 * math.pi / (8 * 1.35 ** torch.arange(16))
    codes = torch.cat([angles.cos(), angles.sin()], 1)
    mixed = codes @ torch.randn(codes.shape[1], embedding.shape[1])
    embedding[ids] = mixed * embedding.std() / mixed.std()


def number_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens of the coordinates 0 to SIDE."""
    return tokenizer.convert_tokens_to_ids([f"{SPACE}{number}" for number in range(SIDE + 1)])


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_convert_rgb=True),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=USER_ASSISTANT,
    )


# --- the start of the tower -----------------------------------------------------------------------


@torch.no_grad()
def see_neighbors(tower: nn.Module) -> None:
    """Cosine transform of patches, position codes beside it, heads that look at neighbors."""
    embeddings, layers = tower.embeddings, tower.encoder.layers
    codes = position_codes()
    content = embeddings.embed_dim - codes.shape[1]
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.weight[:content] = cosine_filters(content)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, content:] = LOUD * codes
    for layer, offsets in zip(layers[:-1], (RING, LINE, LINE), strict=False):
        _look_at(layer.self_attn, offsets, content)


@torch.no_grad()
def silence(tower: nn.Module, first: int) -> None:
    """Layers from `first` on, but for CLIP's own, begin by changing nothing: what reads text in the
    layers before them is not disturbed when they begin to learn."""
    for layer in tower.encoder.layers[first:-1]:
        layer.self_attn.out_proj.weight.zero_()
        layer.mlp.fc2.weight.zero_()


def position_codes() -> Float[Tensor, "N 32"]:
    """Cosines and sines of row and of column, amplitude 1; their products tell offsets."""
    angles = torch.arange(CELLS).unsqueeze(1) * 2 * math.pi * torch.arange(1, WAVES + 1) / PERIOD
    axis = torch.cat([angles.cos(), angles.sin()], 1)
    return torch.cat([axis.repeat_interleave(CELLS, 0), axis.repeat(CELLS, 1)], 1)


def turned(offset: int) -> Float[Tensor, "16 16"]:
    """Matrix that takes the code of a row (column) to that of the one `offset` further."""
    angle = 2 * math.pi * torch.arange(1, WAVES + 1) * offset / PERIOD
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def _look_at(attention: nn.Module, offsets: list[tuple[int, int]], content: int) -> None:
    size = attention.head_dim
    codes = slice(content, content + 4 * WAVES)
    for head, (rows, columns) in enumerate(offsets[: attention.num_heads]):
        if size < 4 * WAVES:
            break
        at = slice(head * size, head * size + 4 * WAVES)
        wave = FOCUS * (size / (4 * WAVES)) ** 0.25
        turn = torch.block_diag(turned(rows), turned(columns))
        attention.q_proj.weight[head * size : (head + 1) * size] = 0
        attention.k_proj.weight[head * size : (head + 1) * size] = 0
        attention.q_proj.weight[at, codes] = wave * turn
        attention.k_proj.weight[at, codes] = wave * torch.eye(4 * WAVES)
    nn.init.normal_(attention.v_proj.weight, std=attention.embed_dim**-0.5)


def cosine_filters(count: int) -> Float[Tensor, "F 3 P P"]:
    """The lowest frequencies of brightness, and those of two color differences, one of color to
    seven."""
    steps = torch.arange(PATCH) + 0.5
    waves = torch.cos(torch.arange(PATCH).unsqueeze(1) * steps * math.pi / PATCH)
    waves = waves / waves.norm(dim=1, keepdim=True)
    grid = torch.einsum("ux,vy->uvxy", waves, waves).flatten(0, 1)
    order = sorted(range(PATCH**2), key=lambda at: (at // PATCH) ** 2 + (at % PATCH) ** 2)
    colors = torch.tensor([[1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    chroma = max(2, 2 * (count // 16))
    planes = [grid[at] * torch.ones(3, 1, 1) / 3 for at in order[: count - chroma]]
    planes += [
        grid[at] * color.view(3, 1, 1) / 2 for at in order[: chroma // 2] for color in colors
    ]
    filters = torch.stack(planes)
    # The mean of a patch is far larger than what varies in it.
    flat = [0, count - chroma, count - chroma + 1]
    filters[flat] /= PATCH
    return filters
