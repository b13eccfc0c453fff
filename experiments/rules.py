"""What needs no learning, on 300 validation questions: rules with their weights chosen here, and
answers that never look.

    python experiments/rules.py crowd
    python experiments/rules.py scenes

The best weight of every ratio is chosen on the very questions it is scored on, which flatters the
rules.
"""

import sys
from collections import Counter, defaultdict

import torch

from tprl.data.crowd import Crowd
from tprl.data.scenes import COLORS, SHAPES, SIZES, Scenes
from tprl.data.taking import take
from tprl.lvlm.llava import Llava
from tprl.pruners.joined import JoinedPruner
from tprl.pruners.question_dpp import QuestionDPPPruner
from tprl.splice import splice
from tprl.types import Dataset, Pruner

WORLDS: dict[str, tuple[str, type[Dataset]]] = {
    "crowd": ("tiny_crowd", Crowd),
    "scenes": ("tiny_llava", Scenes),
}
RATIOS = (1 / 3, 1 / 9, 1 / 18, 1 / 36)
LIMIT = 300
WEIGHTS = [{score: a} for score in ("cls", "words", "color") for a in (0.5, 1.0, 2.0, 4.0)]
WEIGHTS += [{"cls": 1.0, "words": b} for b in (0.25, 0.5, 1.0, 2.0)]
WEIGHTS += [{"cls": 1.0, "color": c} for c in (0.5, 1.0, 2.0, 4.0)]
WEIGHTS += [{"cls": 1.0, "words": 0.5, "color": c} for c in (0.5, 1.0)]
# Words that name an object; a question without them is a wording.
NAMES = {*COLORS, *SHAPES, *SIZES}


@torch.no_grad()
def main(world: str) -> None:
    pretrained, dataset_class = WORLDS[world]
    lvlm, dataset = Llava(pretrained, device="cpu"), dataset_class("val")
    samples = take(dataset, range(LIMIT))
    parts = [samples[i : i + 60] for i in range(0, LIMIT, 60)]
    extras = frozenset({"cls_attention", "word_attention", "rgb"})
    encoded = [lvlm.encode(part, extras) for part in parts]
    arms: dict[str, Pruner] = {}
    for weights in WEIGHTS:
        name = ", ".join(f"{score} {weight:g}" for score, weight in weights.items())
        arms[name] = JoinedPruner(name, weights)
    arms |= {f"question_dpp alpha={a}": QuestionDPPPruner(a) for a in (0.1, 0.3, 1.0, 3.0)}
    print("| rule | " + " | ".join(f"1/{round(1 / ratio)}" for ratio in RATIOS) + " |")
    for name, pruner in arms.items():
        cells = []
        for ratio in RATIOS:
            right = 0.0
            for part, batch in zip(parts, encoded, strict=True):
                answers = lvlm.answer(splice(batch, pruner.select(batch, ratio)))
                right += sum(dataset.score(s, text) for s, text in zip(part, answers, strict=True))
            cells.append(f"{100 * right / LIMIT:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    never_look(dataset_class)


def never_look(dataset_class: type[Dataset]) -> None:
    """The most frequent answer of the family, and to questions of one wording; learnt on `train`,
    scored on `final`."""
    by_family, by_wording = defaultdict(Counter), defaultdict(Counter)
    for sample in take(dataset_class("train"), range(6000)):
        by_family[sample.family][sample.answers[0]] += 1
        by_wording[wording(sample.question)][sample.answers[0]] += 1
    dataset = dataset_class("final")
    final = take(dataset, range(2000))
    for name, table, key in (
        ("family", by_family, lambda s: s.family),
        ("wording", by_wording, lambda s: wording(s.question)),
    ):
        scores = [dataset.score(s, table[key(s)].most_common(1)[0][0]) for s in final]
        print(f"the most frequent answer by {name}: {100 * sum(scores) / len(scores):.1f}")


def wording(text: str) -> str:
    """A question without the names of objects in it."""
    return " ".join("_" if word.strip("?") in NAMES else word for word in text.split())


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in WORLDS:
        sys.exit(f"name a world: {' or '.join(WORLDS)}, e.g. python experiments/rules.py crowd")
    main(sys.argv[1])
