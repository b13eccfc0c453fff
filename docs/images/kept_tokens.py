"""The README's picture: two questions about one image, and the 14 of 256 tokens that pruners keep.

    PYTHONPATH=src python docs/images/kept_tokens.py

It draws the first test image of `crowd` that shows the difference: the pruner that ships answers
both questions right from sets that share at most half of their tokens, and the rule without
learning misses both. The README's table says how often that happens.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from tprl.build import load_component
from tprl.data.crowd import CROWD, Crowd
from tprl.lvlm.llava import Llava
from tprl.pruners.learned import load_pruner
from tprl.report.rasters import mask_picture
from tprl.splice import keep_all, splice
from tprl.types import Sample, TokenSelection

KEEP_RATIO = 1 / 18
SIDE = 360  # pixels of each picture
GUESSED = ("attribute", "existence", "relation")  # by a coin; they are not shown
GOOD, BAD = "#1a7f37", "#cf222e"


@torch.no_grad()
def main() -> None:
    """Write kept_tokens.png beside this file."""
    lvlm, questions = Llava("tiny_crowd"), Crowd("test")
    pruners = [load_component("pruner", "attention_dpp"), load_pruner("tprl_tiny_crowd")]
    extras = frozenset().union(*(pruner.extras for pruner in pruners))
    each = len(CROWD.families)  # questions per image
    for start in range(0, 1200, each):
        samples = [questions[start + i] for i in range(each)]
        encoded = lvlm.encode(samples, extras)
        selections = [
            keep_all(encoded),
            *(pruner.select(encoded, KEEP_RATIO) for pruner in pruners),
        ]
        answers = [lvlm.answer(splice(encoded, selection)) for selection in selections]
        pair = telling_pair(questions, samples, answers, selections[-1].keep)
        if pair is not None:
            draw(questions, samples, selections, answers, pair)
            return


def telling_pair(
    questions: Crowd, samples: list[Sample], answers: list[list[str]], keep: torch.Tensor
) -> tuple[int, int] | None:
    """Two questions that all tokens and TPRL answer, and the rule without learning misses."""

    def right(column: list[str]) -> list[bool]:
        return [
            questions.score(sample, answer) > 0.5
            for sample, answer in zip(samples, column, strict=True)
        ]

    full, rule, learned = map(right, answers)
    open_ended = [sample.family not in GUESSED for sample in samples]
    answered = [i for i in range(len(samples)) if open_ended[i] and full[i] and learned[i]]
    for i in answered:
        for j in answered:
            shared = int((keep[i] & keep[j]).sum())
            if not rule[i] and not rule[j] and i != j and shared <= int(keep[i].sum()) // 2:
                return i, j
    return None


def draw(
    questions: Crowd,
    samples: list[Sample],
    selections: list[TokenSelection],
    answers: list[list[str]],
    pair: tuple[int, int],
) -> None:
    """Two rows of three pictures with their answers."""
    titles = [
        "all 256 tokens",
        "attention_dpp, 14 tokens\n(no learning, no question)",
        "TPRL, 14 tokens",
    ]
    figure, axes = plt.subplots(2, 3, figsize=(6.6, 5.4), layout="constrained")
    for row, i in enumerate(pair):
        for column, selection in enumerate(selections):
            axis, answer = axes[row, column], answers[column][i]
            keep = selection.keep[i].reshape(16, 16).numpy()
            axis.imshow(mask_picture(samples[i].images[0], keep, SIDE))
            axis.set_xticks([])
            axis.set_yticks([])
            right = questions.score(samples[i], answer) > 0.5
            axis.set_xlabel(
                f"{'✓' if right else '✗'} {answer}",
                color=GOOD if right else BAD,
                fontsize=12,
                weight="bold",
            )
            if row == 0:
                axis.set_title(titles[column], fontsize=11)
        axes[row, 0].set_ylabel(textwrap.fill(samples[i].question, 32), fontsize=10)
    path = Path(__file__).with_name("kept_tokens.png")
    figure.savefig(path, dpi=110)
    colors = (
        Image.open(path)
        .convert("RGB")
        .quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    colors.save(path, optimize=True)
    print(path, [samples[i].uid for i in pair])


if __name__ == "__main__":
    main()
