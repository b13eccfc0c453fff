"""`crowd`: 24 to 40 small objects in one image, far more than a small budget of visual tokens can
show.

The same drawn objects as in `scenes`, on 128 x 128 pixels. No two objects agree in size, color and
shape, so these three words name one of them. A pruner that does not read the question cannot know
which.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from tprl.data.draws import Stream
from tprl.data.scenes import (
    COLORS,
    SHAPES,
    Question,
    Scene,
    Scenes,
    Thing,
    World,
    question_of_grounding,
    question_of_relation,
)

SIDE = 128  # pixels
SIZES = {"small": (4, 4), "large": (6, 7)}  # half of the side, pixels, inclusive
GAP = 2  # pixels between two objects, at least
FAR = 2 * SIDE**2
# the neighbor that is asked for is at most 4/5 as far as the next one (squares of distances)
NEARER = 25, 16


def draw_crowd(*key: object) -> Scene:
    """Objects of the scene with this key: up to 40, at least 24 unless fewer fit, no two of one
    look."""
    stream = Stream("things", *key)
    wanted = stream.integer(24, 40)
    looks = stream.shuffled(list(product(SIZES, COLORS, SHAPES)))
    # The twin of the first in the other size comes last, and so never: the size of one object at
    # least can be asked.
    first = looks[0]
    looks.sort(key=lambda look: look[1:] == first[1:] and look != first)
    things: list[Thing] = []
    for size, color, shape in looks[:wanted]:
        half = stream.integer(*SIZES[size])
        for _ in range(200):
            x, y = stream.integer(half, SIDE - half), stream.integer(half, SIDE - half)
            if all(max(abs(x - o.x), abs(y - o.y)) >= half + o.half + GAP for o in things):
                things.append(Thing(color, shape, size, x, y, half))
                break
    return Scene(key, tuple(things), SIDE)


def full_name(thing: Thing) -> str:
    """Size, color and shape: what tells an object from all others."""
    return f"{thing.size} {thing.color} {thing.shape}"


def neighbors(things: Sequence[Thing]) -> list[tuple[Thing, bool]]:
    """For each object the one whose center is nearest, and whether it is clearly nearer than the
    next one.

    Alone, an object is its own neighbor, and not a clear one.
    """
    if len(things) == 1:
        return [(things[0], False)]
    centers = np.array([(thing.x, thing.y) for thing in things])
    squared = np.square(centers[:, None] - centers).sum(-1)  # [things things]
    np.fill_diagonal(squared, FAR)
    # Ties go to the lower index; clear where 25 x nearest <= 16 x next, in squares.
    order = squared.argsort(1, kind="stable")
    ranked = np.take_along_axis(squared, order, 1)
    clear = ranked[:, 1] * NEARER[1] >= ranked[:, 0] * NEARER[0]
    return [(things[other], bool(sure)) for other, sure in zip(order[:, 0], clear, strict=True)]


def _attribute(things: Sequence[Thing], stream: Stream) -> Question:
    # Color and shape alone must name one object, or its size has two answers.
    looks = [(o.color, o.shape) for o in things]
    thing = stream.choice([o for o in things if looks.count((o.color, o.shape)) == 1])
    return Question(
        "attribute",
        f"what size is the {thing.color} {thing.shape}?",
        thing.size,
        None,
        (thing.box,),
    )


def _existence(things: Sequence[Thing], stream: Stream) -> Question:
    if stream.integer(0, 1):
        thing = stream.choice(things)
        return Question("existence", f"is there a {full_name(thing)}?", "yes", None, (thing.box,))
    looks = {(o.size, o.color, o.shape) for o in things}
    size, color, shape = stream.choice(
        [look for look in product(SIZES, COLORS, SHAPES) if look not in looks]
    )
    # Hard negatives: some object differs from what is asked for in one word.
    alike = [o for o in things if (o.size == size) + (o.color == color) + (o.shape == shape) == 2]
    region = tuple(o.box for o in alike or things)
    return Question("existence", f"is there a {size} {color} {shape}?", "no", None, region)


def _count(things: Sequence[Thing], stream: Stream) -> Question:
    # All three are drawn, used or not: the kind that follows does not depend on them.
    size = stream.choice(list(SIZES))
    color = stream.choice(list(COLORS))
    shape = stream.choice(SHAPES)
    match stream.choice(("size and color", "color", "color and shape")):
        case "size and color":
            words = f"{size} {color}"
            chosen = [o for o in things if (o.size, o.color) == (size, color)]
        case "color":
            words = color
            chosen = [o for o in things if o.color == color]
        case _:
            words = f"{color} {shape}"
            chosen = [o for o in things if (o.color, o.shape) == (color, shape)]
    # Nothing to count means that every object of the color had to be looked at.
    seen = chosen or [o for o in things if o.color == color] or things
    text = f"how many {words} objects are there?"
    return Question("count", text, str(len(chosen)), None, tuple(o.box for o in seen))


def _relation(things: Sequence[Thing], stream: Stream) -> Question:
    return question_of_relation(things, stream, full_name)


def _neighbor(things: Sequence[Thing], stream: Stream) -> Question:
    # Where no neighbor is clear, any object is asked for rather than none.
    pairs = list(zip(things, neighbors(things), strict=True))
    clear = [(thing, other) for thing, (other, sure) in pairs if sure]
    thing, other = stream.choice(clear or [(thing, other) for thing, (other, _) in pairs])
    kind = stream.choice(("color", "shape"))
    answer = other.color if kind == "color" else other.shape
    return Question(
        "neighbor",
        f"what {kind} is next to the {full_name(thing)}?",
        answer,
        None,
        (thing.box, other.box),
    )


def _grounding(things: Sequence[Thing], stream: Stream) -> Question:
    return question_of_grounding(things, stream, full_name)


CROWD = World(
    "crowd",
    SIDE,
    {"train": 1_200_000, "val": 2_400, "test": 6_000, "final": 6_000},
    draw_crowd,
    {
        "attribute": _attribute,
        "existence": _existence,
        "count": _count,
        "relation": _relation,
        "neighbor": _neighbor,
        "grounding": _grounding,
    },
)


class Crowd(Scenes):
    """The dataset; arguments, scores and errors are those of `Scenes`."""

    name = "crowd"
    world = CROWD
