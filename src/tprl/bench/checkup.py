"""What a model makes of questions before any weight is there: its prompt, its tokens, and what it
never sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from PIL import Image

from tprl.errors import UserError
from tprl.lvlm.batching import check_placeholders, pick_images, unique_images
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.texts import question_mask
from tprl.types import Sample

# width x height: a photograph, one on its side, a large one
SHAPES = ((640, 480), (480, 640), (1600, 1200))
LONGEST_RUN = 3  # equal tokens in a row that are shown one by one


@dataclass(frozen=True)
class PromptReading:
    """A prompt as the model will read it.

    Args:
        prompt: its tokens as text, the question between «», runs of image tokens counted.
        question: what the question mask holds.
        answer: tokens of the reference answer, the end token last.
        text, visual: tokens of the prompt.
    """

    prompt: str
    question: str
    answer: tuple[str, ...]
    text: int
    visual: int


@dataclass(frozen=True)
class Shape:
    """An image of a size: its visual tokens, patches of each pass of the tower, and the share that
    is seen."""

    size: tuple[int, int]
    tokens: int
    tiles: int
    seen: float


def read(lvlm: FrozenLVLM, sample: Sample) -> PromptReading:
    """What the model reads of a question with images.

    Raises:
        UserError: placeholders and features differ in number, no question is found, or the sample
            cannot be read.
    """
    if (bad := lvlm.refusal(sample)) is not None:
        raise UserError(f"{lvlm.name} cannot read sample {sample.uid}, {bad[0]}: {bad[1]}.")
    # The processor runs as ever: only the tower and the language model are missing.
    inputs, prompts = lvlm.processed([sample])
    ids, counts = inputs["input_ids"][0], _counts(lvlm, sample, inputs)
    is_image = inputs["input_ids"] == lvlm.image_token
    mask = question_mask(
        lvlm.tokenizer, inputs["offset_mapping"], is_image, prompts, [counts], lvlm.placeholder
    )[0]
    # A mask that holds other words than the question would mislead every pruner that reads it.
    asked = lvlm.tokenizer.decode(ids[mask]).strip()
    if _squeezed(asked) != _squeezed(sample.question):
        raise UserError(
            f"in the prompt of {lvlm.name}, {asked!r} would be read as the question of sample "
            f"{sample.uid}, which is {sample.question!r}: set model.prompt to a template with "
            "{question}."
        )
    answer = lvlm.answer_row(sample.answers[0]) if sample.answers else []
    tokens = lvlm.tokenizer.convert_ids_to_tokens(answer)
    marked = _marked(lvlm, ids.tolist(), mask.tolist())
    return PromptReading(marked, asked, tuple(tokens), len(ids) - sum(counts), sum(counts))


def _squeezed(text: str) -> str:
    """Without white space and case: tokenizers of words lose the one, some tokenizers the other."""
    return "".join(text.split()).casefold()


def _counts(lvlm: FrozenLVLM, sample: Sample, inputs: object) -> list[int]:
    """Features of each image, and that the prompt has as many placeholders."""
    first, occurrences = unique_images([sample])
    if not first:
        return []
    pixels = lvlm.pixels_of(inputs)  # type: ignore[arg-type]
    features = lvlm.feature_counts(pick_images(pixels, lvlm.rows_per_image(pixels), first))
    is_image = inputs["input_ids"] == lvlm.image_token  # type: ignore[index]
    check_placeholders(is_image, occurrences, features, [sample.uid], lvlm.one_run, lvlm.remedy)
    return [features[image] for image in occurrences[0]]


def _marked(lvlm: FrozenLVLM, ids: Sequence[int], mask: Sequence[bool]) -> str:
    """The prompt as text, with marks; tokens of images are counted, not shown."""
    pieces: list[str] = []
    start = 0
    while start < len(ids):
        # One run of tokens of a kind: in the question or not, image or text.
        stop = start + 1
        while stop < len(ids) and mask[stop] == mask[start] and _same(lvlm, ids[stop], ids[start]):
            stop += 1
        # Few image tokens, such as marks of a tile, are shown as they are.
        text = lvlm.tokenizer.decode(ids[start:stop])
        if ids[start] == lvlm.image_token and stop - start > LONGEST_RUN:
            text = f"{lvlm.tokenizer.convert_ids_to_tokens(lvlm.image_token)}*{stop - start}"
        pieces.append(f"«{text.strip()}»" if mask[start] else text)
        start = stop
    return "".join(pieces)


def _same(lvlm: FrozenLVLM, token: int, other: int) -> bool:
    """Whether both are image tokens, or neither."""
    return (token == lvlm.image_token) == (other == lvlm.image_token)


def shape_of(lvlm: FrozenLVLM, size: tuple[int, int], question: str) -> Shape:
    """What becomes of a picture of that size.

    Raises:
        UserError: the processor refuses it, or writes another number of placeholders than there are
            features.
    """
    sample = Sample(f"{size[0]} x {size[1]}", (Image.new("RGB", size),), question, ())
    inputs, _ = lvlm.processed([sample])
    tokens = sum(_counts(lvlm, sample, inputs))
    # A box may reach outside where the processor pads: the share is of the image.
    x1, y1, x2, y2 = lvlm.seen_box(*size)
    across, down = min(x2, size[0]) - max(x1, 0), min(y2, size[1]) - max(y1, 0)
    return Shape(size, tokens, len(tiles_of(lvlm, sample)), across * down / (size[0] * size[1]))


def tiles_of(lvlm: FrozenLVLM, sample: Sample) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the patches of every pass of the tower, for the cost model."""
    inputs, _ = lvlm.processed([sample])
    pixels = lvlm.pixels_of(inputs)
    if "image_grid_thw" in pixels:
        return tuple((rows, columns) for _, rows, columns in pixels["image_grid_thw"].tolist())
    if "image_position_ids" in pixels:  # places of patches, padding behind them
        last = pixels["image_position_ids"].amax(1) + 1
        return tuple((rows, columns) for columns, rows in last.tolist())
    values, patches = pixels["pixel_values"], lvlm.shape.vision.patches
    if values.ndim == 5:  # crops or tiles of an image, padded with zeros
        count = int(values.flatten(2).any(2).sum())
        return ((1, patches),) * max(count, 1)
    return ((1, patches),) * len(values)


def packages() -> dict[str, str]:
    """Versions that decide what a processor does."""
    versions = {}
    for name in ("torch", "transformers", "torchvision", "sentencepiece", "accelerate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
