"""`scenes`: CLEVR-style questions about colored shapes on a noisy background, drawn from a seed and
an index.

Every image shows 3-6 objects. Each image is asked five questions, one per family: attribute,
existence (hard negatives), count, relation, grounding. Only integer and IEEE-exact operations touch
the pixels, so the same (split, index) gives the same bytes on every machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from tprl.data.base import BaseDataset
from tprl.data.boxes import iou
from tprl.data.draws import Stream
from tprl.data.values import name_list
from tprl.errors import UserError
from tprl.types import Box, Sample

SIDE = 96  # pixels
COLORS = {
    "red": (205, 50, 45),
    "green": (50, 165, 60),
    "blue": (50, 85, 205),
    "yellow": (220, 195, 50),
    "purple": (150, 60, 175),
    "cyan": (60, 190, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (5, 7), "large": (10, 13)}  # half of the side, pixels, inclusive
Split = Literal["train", "val", "test", "final"]


class Thing(NamedTuple):
    """One object of a scene: center and half-side in pixels."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    half: int

    @property
    def box(self) -> Box:
        x, y, half = float(self.x), float(self.y), float(self.half)
        return (x - half, y - half, x + half, y + half)


class Question(NamedTuple):
    family: str
    text: str
    answer: str
    box: Box | None
    region: tuple[Box, ...]


class Scene(NamedTuple):
    """A drawn scene: its key, its objects (drawing order), its side in pixels, and how to render
    it."""

    key: tuple[object, ...]
    things: tuple[Thing, ...]
    side: int = SIDE

    @property
    def pixels(self) -> np.ndarray:
        return scene_pixels(self)


def draw_scene(*key: object) -> Scene:
    """Objects of the scene with this key: 3-6, no two alike in (color, shape), at least 3 pixels
    apart."""
    # Every draw is from one stream in this order: the same key is the same scene for ever.
    stream = Stream("things", *key)
    wanted = stream.integer(3, 6)
    # few colors, so that counts exceed one
    palette = stream.shuffled(list(COLORS))[: stream.integer(3, 4)]
    looks = stream.shuffled(list(product(palette, SHAPES)))
    things: list[Thing] = []
    while len(things) < wanted:
        size = stream.choice(list(SIZES))
        half = stream.integer(*SIZES[size])
        # Rejection; where no place is left, another size is tried.
        for _ in range(40):
            x, y = stream.integer(half, SIDE - half), stream.integer(half, SIDE - half)
            if all(max(abs(x - o.x), abs(y - o.y)) >= half + o.half + 3 for o in things):
                color, shape = looks[len(things)]
                things.append(Thing(color, shape, size, x, y, half))
                break
    return Scene(key, tuple(things))


def pixels_inside(thing: Thing, side: int = SIDE) -> np.ndarray:
    """[side side] True on the pixels of an object; doubled integer coordinates, pixel centers."""
    # Twice the distance of pixel centers from the object's center, which stays whole.
    y, x = np.mgrid[0:side, 0:side]
    dx, dy, h = np.abs(2 * x + 1 - 2 * thing.x), 2 * y + 1 - 2 * thing.y, 2 * thing.half
    match thing.shape:
        case "circle":
            return dx * dx + dy * dy <= h * h
        case "square":
            return (dx <= h) & (np.abs(dy) <= h)
        case "triangle":
            return (np.abs(dy) <= h) & (2 * dx <= dy + h)
        case _:
            bar = 2 * h // 5
            return ((dx <= bar) & (np.abs(dy) <= h)) | ((np.abs(dy) <= bar) & (dx <= h))


def scene_pixels(scene: Scene) -> np.ndarray:
    """[side side 3] uint8 pixels: tinted value noise, stripes, shaded objects, then sensor noise
    over everything."""
    stream = Stream("pixels", *scene.key)
    # A gray with a tint, and value noise: 9 x 9 values, interpolated in whole numbers.
    base = stream.integer(95, 150) + stream.integers(-14, 14, (1, 1, 3))
    coarse = stream.integers(-28, 28, (9, 9, 1))
    y, x = np.mgrid[0 : scene.side, 0 : scene.side]
    cell = scene.side // 8
    cy, cx, fy, fx = y // cell, x // cell, (y % cell)[..., None], (x % cell)[..., None]
    top = coarse[cy, cx] * (cell - fx) + coarse[cy, cx + 1] * fx
    bottom = coarse[cy + 1, cx] * (cell - fx) + coarse[cy + 1, cx + 1] * fx
    texture = (top * (cell - fy) + bottom * fy) // (cell * cell)
    # Stripes of any slope: an edge alone must not tell an object.
    slope, period = stream.integer(-3, 3), stream.integer(5, 17)
    stripes = np.where((x + slope * y) % period < period // 2, stream.integer(2, 10), 0)[..., None]
    image = base + texture + stripes
    for thing in scene.things:
        # A color varies from object to object, and over each of them.
        tint = np.array(COLORS[thing.color]) + stream.integers(-16, 16, (3,))
        shade = stream.integer(-2, 2) * (x - thing.x) + stream.integer(-2, 2) * (y - thing.y)
        inside = pixels_inside(thing, scene.side)
        image = np.where(inside[..., None], tint + shade[..., None], image)
    image = image + stream.integers(-13, 13, (scene.side, scene.side, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def describe(scene: Scene) -> str:
    """Every object with its box, in raster order of the centers: the caption that teaches to read
    visual tokens."""
    ordered = sorted(scene.things, key=lambda t: (t.y, t.x))
    return " , ".join(f"{t.size} {t.color} {t.shape} {corners_text(t.box)}" for t in ordered)


def corners_text(box: Box) -> str:
    """A box as the answer text: four integers, pixels."""
    return " ".join(str(int(v)) for v in box)


def parse_box(text: str) -> Box | None:
    """The box written in an answer: exactly four integers, else None."""
    words = text.split()
    if len(words) != 4 or not all(word.isdecimal() for word in words):
        return None
    x1, y1, x2, y2 = map(float, words)
    return (x1, y1, x2, y2)


def name_of(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _attribute(things: Sequence[Thing], stream: Stream) -> Question:
    thing = stream.choice(things)
    # Only what is unambiguous is asked: a word less, or the size in its place.
    options = [(f"what size is the {name_of(thing)}?", thing.size)]
    if sum(o.shape == thing.shape for o in things) == 1:
        options.append((f"what color is the {thing.shape}?", thing.color))
    elif sum((o.shape, o.size) == (thing.shape, thing.size) for o in things) == 1:
        options.append((f"what color is the {thing.size} {thing.shape}?", thing.color))
    if sum(o.color == thing.color for o in things) == 1:
        options.append((f"what shape is the {thing.color} object?", thing.shape))
    elif sum((o.color, o.size) == (thing.color, thing.size) for o in things) == 1:
        options.append((f"what shape is the {thing.size} {thing.color} object?", thing.shape))
    text, answer = stream.choice(options)
    return Question("attribute", text, answer, None, (thing.box,))


def _existence(things: Sequence[Thing], stream: Stream) -> Question:
    looks = {(o.color, o.shape) for o in things}
    # Hard negatives: the color is there and the shape is there, but not together.
    absent = [(o.color, p.shape) for o in things for p in things if (o.color, p.shape) not in looks]
    if absent and stream.integer(0, 1):
        color, shape = stream.choice(sorted(set(absent)))
        region = tuple(o.box for o in things if o.color == color or o.shape == shape)
        return Question("existence", f"is there a {color} {shape}?", "no", None, region)
    thing = stream.choice(things)
    return Question("existence", f"is there a {name_of(thing)}?", "yes", None, (thing.box,))


def _count(things: Sequence[Thing], stream: Stream) -> Question:
    kind = stream.choice(("color", "shape", "size", "all"))
    if kind == "all":
        text, chosen = "how many objects are there?", list(things)
    elif kind == "shape":
        shape = stream.choice(SHAPES)
        text = f"how many {shape} objects are there?"
        chosen = [o for o in things if o.shape == shape]
    elif kind == "size":
        size = stream.choice(list(SIZES))
        text = f"how many {size} objects are there?"
        chosen = [o for o in things if o.size == size]
    else:
        color = stream.choice([o.color for o in things])
        text = f"how many {color} objects are there?"
        chosen = [o for o in things if o.color == color]
    # Nothing to count means that every object had to be looked at.
    return Question("count", text, str(len(chosen)), None, tuple(o.box for o in (chosen or things)))


def question_of_relation(
    things: Sequence[Thing], stream: Stream, name: Callable[[Thing], str] = name_of
) -> Question:
    """Which side of one object another lies on, along the axis on which they are further apart."""
    a, b = stream.shuffled(things)[:2]
    horizontal = abs(a.x - b.x) >= abs(a.y - b.y)
    if horizontal:
        words, answer = "left or right of", "left" if a.x < b.x else "right"
    else:
        # y grows downward.
        words, answer = "above or below", "above" if a.y < b.y else "below"
    return Question(
        "relation", f"is the {name(a)} {words} the {name(b)}?", answer, None, (a.box, b.box)
    )


def question_of_grounding(
    things: Sequence[Thing], stream: Stream, name: Callable[[Thing], str] = name_of
) -> Question:
    """Where an object is; the answer is its box."""
    thing = stream.choice(things)
    box = thing.box
    return Question("grounding", f"where is the {name(thing)}?", corners_text(box), box, (box,))


@dataclass(frozen=True, eq=False)
class World:
    """Drawn images and the questions about them.

    Args:
        name: of the dataset, the first part of its uids.
        side: of an image, pixels.
        splits: questions in each split.
        draw: the scene with a key.
        ask: for each family, a question about the objects of a scene.
    """

    name: str
    side: int
    splits: Mapping[str, int]
    draw: Callable[..., Scene]
    ask: Mapping[str, Callable[[Sequence[Thing], Stream], Question]]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self.ask)


SCENES = World(
    "scenes",
    SIDE,
    {"train": 1_000_000, "val": 2_000, "test": 6_000, "final": 6_000},
    draw_scene,
    {
        "attribute": _attribute,
        "existence": _existence,
        "count": _count,
        "relation": question_of_relation,
        "grounding": question_of_grounding,
    },
)
FAMILIES = SCENES.families


class Scenes(BaseDataset):
    """The dataset: of F families, question `i` is family `i % F` of image `i // F` of the split.

    Score (in [0, 1]): exact match of the answer, case and outer spaces ignored; grounding counts as
    right when the IoU of the predicted and the true box is at least 0.5. `iou` gives the box
    overlap itself.

    Args:
        split: "train", "val", "test" or "final"; their seeds are disjoint and the test sets never
            change. "final" is a second test set: read it once, for claims about methods that were
            changed after "test" had been read.
        limit: use only the first `limit` questions; None uses the whole split.
        seed: shifts the *training* images only.
        families: families to ask, None asks all; leaving one out is for transfer studies.
        rounds: questions of each family about an image, 1 to 3, those of one round first.

    Raises:
        UserError: an unknown split or family, a family twice, a limit below 1, or other rounds.
    """

    name = "scenes"
    world = SCENES

    def __init__(
        self,
        split: str = "train",
        limit: int | None = None,
        seed: int = 0,
        families: str | Sequence[str] | None = None,
        rounds: int = 1,
    ) -> None:
        world = self.world
        families = world.families if families is None else name_list("dataset.families", families)
        if split not in world.splits:
            splits = ", ".join(world.splits)
            raise UserError(
                f"dataset split '{split}' does not exist in {self.name}: choose one of {splits}."
            )
        if not families or set(families) - set(world.families):
            raise UserError(
                f"dataset.families must be among {', '.join(world.families)}, got {list(families)}."
            )
        if len(set(families)) < len(families):
            raise UserError(f"dataset.families must name each family once, got {list(families)}.")
        if limit is not None and limit < 1:
            raise UserError(
                f"limit must be at least 1 or null, got {limit}; null reads the whole split."
            )
        if rounds not in (1, 2, 3):  # every family has three questions about three objects
            raise UserError(f"rounds must be 1 to 3, got {rounds}; use e.g. 2.")
        self.split, self.families, self.rounds = split, tuple(families), rounds
        self.questions_per_image = len(self.families) * rounds
        self._key = (split, seed if split == "train" else 0)
        questions = world.splits[split] * rounds
        self._length = questions if limit is None else min(limit, questions)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        image, slot = divmod(index, self.questions_per_image)
        number, family = divmod(slot, len(self.families))
        family = self.families[family]
        scene, picture = _scene(self.world, *self._key, image)
        question = self._question(scene, image, family, number)
        # A seed of its own shows in the uid: other images, other questions.
        split = f"{self.split}-{self._key[1]}" if self._key[1] else self.split
        again = f"-{number + 1}" if number else ""
        uid = f"{self.name}/{split}/{image}/{family}{again}"
        return Sample(
            uid,
            (picture,),
            question.text,
            (question.answer,),
            family,
            question.box,
            question.region,
        )

    def _question(self, scene: Scene, image: int, family: str, number: int) -> Question:
        """Question `number` of a family; those after the first are drawn until their words are
        new."""
        key = ("question", *self._key, image, family)
        asked = [self.world.ask[family](scene.things, Stream(*key))]
        draw = 0
        while len(asked) <= number:
            draw += 1
            question = self.world.ask[family](scene.things, Stream(*key, draw))
            if question.text not in [before.text for before in asked]:
                asked.append(question)
        return asked[number]

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction counts as right, else 0.0."""
        if sample.box is not None:
            return float(self.iou(sample, prediction) >= 0.5)
        return float(prediction.strip().lower() in {answer.lower() for answer in sample.answers})

    def iou(self, sample: Sample, prediction: str) -> float:
        """Overlap of a grounding answer with the true box; 0 where no box can be read from the
        answer."""
        predicted = parse_box(prediction)
        return iou(predicted, sample.box) if predicted and sample.box else 0.0

    def teacher_forced(self, sample: Sample) -> bool:
        """Exact-match answers can be scored by one teacher-forced forward; boxes need the generated
        text."""
        return sample.box is None


@lru_cache(maxsize=256)
def _scene(world: World, *key: object) -> tuple[Scene, Image.Image]:
    scene = world.draw(world.name, *key)
    return scene, Image.fromarray(scene_pixels(scene))
