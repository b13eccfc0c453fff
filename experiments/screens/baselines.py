"""python experiments/screens/baselines.py: what answers that never look at the page score, as rows
for README.md."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from tprl.data.screens import FAMILIES, Screens
from tprl.data.taking import take
from tprl.types import Sample

SPLITS = ("val", "test", "final", "real")
SIDE = 320
TEMPLATES = (
    (r"^what does the field .* say", "what does the field"),
    (r"^what is chosen (in|for) ", "what is chosen"),
    (r"^what is (left of|right of|above|below) ", "what is next to"),
    (r"^what is the \w+ of ", "what is the column of"),
    (r"^what number has ", "what number"),
    (r"^is .* (ticked|on)\?$", "is it"),
    (r"^how many rows say ", "how many rows say"),
)


def template(question: str) -> str:
    """The wording of a question without the names in it."""
    for pattern, name in TEMPLATES:
        if re.match(pattern, question):
            return name
    return question


def learned(samples: Sequence[Sample], key: Callable[[Sample], str]) -> dict[str, str]:
    """The most frequent answer for each key."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        counts[key(sample)][sample.answers[0].lower()] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}


def mean_box(samples: Sequence[Sample]) -> str:
    """The box of a family, coordinate by coordinate, as its mean."""
    boxes = [sample.box for sample in samples if sample.box is not None]
    return " ".join(str(round(sum(values) / len(boxes))) for values in zip(*boxes, strict=True))


def guesses(family: str, seen: Sequence[Sample]) -> dict[str, Callable[[Sample], str]]:
    """Ways to answer without a look, learnt from the questions of another split."""
    if seen[0].box is not None:
        box, draw = mean_box(seen), random.Random(0)

        def point(_: Sample) -> str:
            return " ".join([str(draw.randrange(SIDE)), str(draw.randrange(SIDE))] * 2)

        return {"constant": lambda _: box, "centre": lambda _: "160 160 160 160", "random": point}
    always = learned(seen, lambda sample: sample.family)
    worded = learned(seen, lambda sample: template(sample.question))
    exact = learned(seen, lambda sample: sample.question.lower())
    return {
        "constant": lambda _: always[family],
        "by wording": lambda sample: worded.get(template(sample.question), always[family]),
        "by question": lambda s: exact.get(
            s.question.lower(), worded.get(template(s.question), always[family])
        ),
    }


def main() -> None:
    data = {split: Screens(split, bare=True) for split in SPLITS}
    samples = {split: take(data[split], range(len(data[split]))) for split in SPLITS}
    seen = samples["val"] + samples["test"]
    print(
        "| split | family | questions | answers | most "
        "frequent | blind answers |\n|---|---|---|---|---|---|"
    )
    for split in ("final", "real"):
        for family in FAMILIES:
            asked = [sample for sample in samples[split] if sample.family == family]
            if not asked:
                continue
            answers = Counter(sample.answers[0].lower() for sample in asked)
            word, count = answers.most_common(1)[0]
            most = "" if asked[0].box else f"{word} {100 * count / len(asked):.0f} %"
            scores = []
            for name, guess in guesses(family, [s for s in seen if s.family == family]).items():
                right = sum(data[split].score(sample, guess(sample)) for sample in asked)
                scores.append(f"{name} {100 * right / len(asked):.1f}")
            kinds = "" if asked[0].box else str(len(answers))
            print(f"| {split} | {family} | {len(asked)} | {kinds} | {most} | {', '.join(scores)} |")
    for split in SPLITS:
        pages = len({sample.uid.split("/")[2] for sample in samples[split]})
        boxes = [s.box for s in samples[split] if s.box]
        area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes) / len(boxes) / SIDE**2
        print(
            f"{split}: {pages} pages, {len(samples[split])} "
            f"questions, a box is {100 * area:.1f} % of the page"
        )


if __name__ == "__main__":
    main()
