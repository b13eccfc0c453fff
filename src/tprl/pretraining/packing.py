"""Pretraining batches for the embedded LVLM: many questions about one image packed behind one
visual prefix.

Questions of a pack never see each other: each attends to the image and to itself, at the positions
it would have alone. So ten questions cost little more than one, and training sees exactly the
prompts of inference.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import LlavaProcessor

from tprl.data import scenes
from tprl.data.crowd import neighbors
from tprl.data.draws import Stream
from tprl.data.scenes import SCENES, World
from tprl.pretraining.tiny_llava import DESCRIBE, PROMPT

IGNORE = -100
CAPTIONED = 6  # objects in a caption of the text tower, which reads 77 tokens


class Pack(NamedTuple):
    """A pretraining batch. C text columns (all segments of a sample, padded), N patches."""

    pixels: Float[Tensor, "B 3 H W"]
    owner: Int[Tensor, "B N"]  # patch labels: index into the attribute tables below, 0 = background
    color: Int[Tensor, "B N"]
    shape: Int[Tensor, "B N"]
    size: Int[Tensor, "B N"]
    box: Int[Tensor, "B N 4"]  # pixels; IGNORE on background
    next: Int[Tensor, "B N"]  # the owner of the patches of the object nearest to the patch's own
    next_color: Int[Tensor, "B N"]
    next_shape: Int[Tensor, "B N"]
    present: Float[Tensor, "B L"]  # which (color, shape) looks are in the image
    caption: Int[Tensor, "B W"]  # for the contrastive text tower, right-padded
    text: Int[Tensor, "B C"]
    segment: Int[Tensor, "B C"]  # 0 = padding
    offset: Int[Tensor, "B C"]  # position inside the segment
    target: Int[Tensor, "B C"]  # next token where it is part of an answer, else IGNORE
    is_box: Bool[Tensor, "B C"]  # the target is a coordinate
    family: Int[Tensor, "B C"]  # index of the family, len(FAMILIES) for captions
    # per segment number: patches of the objects that decide the answer; captions none
    region: Bool[Tensor, "B G N"]
    step: int


class PackStream(IterableDataset[Pack]):
    """Pack `i` is a function of (seed, i) alone, so a run resumed at step i continues exactly.

    Args:
        processor: of the LVLM to be trained.
        start, stop: range of steps.
        patch: side of a patch, pixels.
        text_from: before this step packs carry no questions (the vision tower is trained alone).
        caption_until: up to this step every pack also holds the caption of all objects; then one in
            `caption_every`.
        vision_batch, language_batch: images in a pack before and from `text_from`.
        questions: questions per family and image.
        world: what is drawn and asked.
        caption_every: one pack in so many holds the caption after `caption_until`; 0: none does.
    """

    def __init__(
        self,
        processor: LlavaProcessor,
        start: int,
        stop: int,
        patch: int,
        text_from: int,
        caption_until: int,
        vision_batch: int,
        language_batch: int,
        questions: int = 2,
        seed: int = 0,
        world: World = SCENES,
        caption_every: int = 8,
    ) -> None:
        self.world, self.caption_every = world, caption_every
        self.processor, self.start, self.stop, self.patch = processor, start, stop, patch
        self.text_from, self.caption_until = text_from, caption_until
        self.vision_batch, self.language_batch = vision_batch, language_batch
        self.questions, self.seed = questions, seed
        self._tokens: dict[str, list[int]] = {}

    def __iter__(self) -> Iterator[Pack]:
        worker = torch.utils.data.get_worker_info()
        # Workers take turns, so that steps come in order whatever their number.
        first, stride = self.start, 1
        if worker is not None:
            first, stride = self.start + worker.id, worker.num_workers
        return (self.pack(step) for step in range(first, self.stop, stride))

    def pack(self, step: int) -> Pack:
        # Images: what is drawn depends on (seed, step, place in the pack) alone.
        with_text = step >= self.text_from
        images = self.language_batch if with_text else self.vision_batch
        drawn = [self.world.draw("pretrain", self.seed, step, i) for i in range(images)]
        pictures = [scenes.scene_pixels(scene) for scene in drawn]
        pixels = self.processor.image_processor(
            pictures, return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        labels = [self._patch_labels(scene) for scene in drawn]
        # Text: captions on every pack at first, then on one in `caption_every`.
        stream = Stream("pack", self.seed, step)
        often = self.caption_every > 0 and step % self.caption_every == 0
        described = with_text and (step < self.caption_until or often)
        asked = [self._questions(scene, stream) if with_text else [] for scene in drawn]
        rows, region = [], []
        for scene, some, label in zip(drawn, asked, labels, strict=True):
            rows.append(self._segments(scene, some, described))
            region.append(_regions(scene, some, label["owner"]))
        captions = [self._encode(self._caption(scene, stream)) for scene in drawn]
        stacked = {}
        for name in labels[0]:
            stacked[name] = torch.stack([label[name] for label in labels])
        return Pack(
            pixels=pixels,
            caption=_pad(captions, 0),
            **stacked,
            **_collate(rows, self.world.families.index("grounding")),
            region=torch.stack(region),
            step=step,
        )

    def _encode(self, text: str) -> list[int]:
        if text not in self._tokens:
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(text) > 60:  # captions and boxes hardly ever repeat
                return ids
            self._tokens[text] = ids
        return self._tokens[text]

    def _caption(self, scene: scenes.Scene, stream: Stream) -> str:
        things = stream.shuffled(scene.things)[:CAPTIONED]
        names = [f"a {thing.size} {thing.color} {thing.shape}" for thing in things]
        return "<s> a photo with " + " and ".join(names) + " </s>"

    def _questions(self, scene: scenes.Scene, stream: Stream) -> list[scenes.Question]:
        asked = []
        for ask in self.world.ask.values():
            asked += [ask(scene.things, stream) for _ in range(self.questions)]
        return asked

    def _segments(
        self, scene: scenes.Scene, asked: list[scenes.Question], described: bool
    ) -> list[tuple[list[int], list[int], int]]:
        # Captions count as a family of their own, after those of questions.
        texts = [(q.text, q.answer, self.world.families.index(q.family)) for q in asked]
        if described:
            texts.append((DESCRIBE, scenes.describe(scene), len(self.world.families)))
        # Only what follows the image: its beginning is the prefix that all segments share.
        tail = PROMPT.split("\n")[1]
        segments = []
        for question, answer, family in texts:
            prompt = self._encode(tail.format(question=question))
            segments.append((prompt, self._encode(f"{answer} </s>"), family))
        return segments

    def _patch_labels(self, scene: scenes.Scene) -> dict[str, Tensor]:
        """Labels of every patch: the object that owns most of its pixels, if at least a sixth of
        the patch."""
        cells, p = scene.side // self.patch, self.patch
        # [objects patches] pixels of each patch that an object covers.
        masks = np.stack([scenes.pixels_inside(thing, scene.side) for thing in scene.things])
        share = masks.reshape(len(masks), cells, p, cells, p).sum((2, 4)).reshape(len(masks), -1)
        # An object owns a patch from a sixth of its pixels on; else background.
        owner = np.where(share.max(0) * 6 >= p * p, share.argmax(0) + 1, 0)
        # Attributes by owner; row 0 is the background.
        beside = [other for other, _ in neighbors(scene.things)]
        table = [(0, 0, 0, (IGNORE,) * 4, 0, 0, 0)]
        for thing, other in zip(scene.things, beside, strict=True):
            corners = tuple(map(int, thing.box))
            number = 1 + scene.things.index(other)
            table.append((*_look(thing), corners, number, *_look(other)[:2]))
        # Which combinations of color and shape the image shows: the target of CLS.
        looks = torch.zeros(len(scenes.COLORS) * len(scenes.SHAPES))
        for color, shape, *_ in table[1:]:
            looks[(color - 1) * len(scenes.SHAPES) + shape - 1] = 1
        # By patch: every column of the table at the patch's owner.
        columns = [torch.from_numpy(np.array(column)[owner]) for column in zip(*table, strict=True)]
        names = ("color", "shape", "size", "box", "next", "next_color", "next_shape")
        return {
            "owner": torch.from_numpy(owner),
            **dict(zip(names, columns, strict=True)),
            "present": looks,
        }


def _look(thing: scenes.Thing) -> tuple[int, int, int]:
    """Labels of color, shape and size; 0 is background."""
    color, shape = [*scenes.COLORS].index(thing.color), scenes.SHAPES.index(thing.shape)
    return 1 + color, 1 + shape, 1 + [*scenes.SIZES].index(thing.size)


def _regions(
    scene: scenes.Scene, asked: list[scenes.Question], owner: Tensor
) -> Bool[Tensor, "G N"]:
    """Patches of the objects that decide each question; row 0 (padding) and the last row (caption)
    are empty."""
    out = torch.zeros(len(asked) + 2, len(owner), dtype=torch.bool)
    for number, question in enumerate(asked, 1):
        for index, thing in enumerate(scene.things, 1):
            if thing.box in question.region:
                out[number] |= owner == index
    return out


def _collate(
    rows: list[list[tuple[list[int], list[int], int]]], grounding: int
) -> dict[str, Tensor]:
    """Segments of every sample side by side; targets sit on the token that predicts them."""
    fields: dict[str, list[list[int]]] = {
        name: [] for name in ("text", "segment", "offset", "target", "is_box", "family")
    }
    for segments in rows:
        flat: dict[str, list[int]] = {name: [] for name in fields}
        for number, (question, answer, family) in enumerate(segments, 1):
            # The token before each token of the answer predicts it, the question's last the first.
            ids = question + answer[:-1]
            targets = [IGNORE] * (len(question) - 1) + answer
            is_box = family == grounding
            flat["text"] += ids
            flat["segment"] += [number] * len(ids)
            flat["offset"] += range(len(ids))
            flat["target"] += targets
            flat["is_box"] += [int(is_box and t != IGNORE and t != answer[-1]) for t in targets]
            flat["family"] += [family] * len(ids)
        for name, values in flat.items():
            fields[name].append(values)
    # Padding is no target: segment 0, and IGNORE where a loss would look.
    out = {name: _pad(values, IGNORE if name == "target" else 0) for name, values in fields.items()}
    out["is_box"] = out["is_box"].bool()
    return out


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)
