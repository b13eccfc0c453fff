"""What needs no learning, on 300 validation questions of `crowd`: rules with their weights chosen
here, and answers that never look.

    python experiments/crowd/rules.py

Besides the controls of `conf/pruner`: attention and question together as the quality of the DPP,
log q = a * attention + b * relevance, both as z-scores in the image. The best weight of every ratio
is chosen on the very questions it is scored on, which flatters the rules.
"""

from collections import Counter, defaultdict

import torch

from tprl.data.crowd import Crowd
from tprl.data.taking import take
from tprl.lvlm.llava import Llava
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.keyword_color import KeywordColorPruner
from tprl.pruners.quality import diverse, log_attention, standardize
from tprl.pruners.question_dpp import QuestionDPPPruner, relevance
from tprl.pruners.word_attention import WordAttentionPruner
from tprl.splice import splice

RATIOS = (1 / 9, 1 / 18, 1 / 36)
LIMIT = 300


class AttentionQuestionDPP(AttentionDPPPruner):
    """Both scores as one quality; weights a and b."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def choose(self, images, encoded, k):
        attention = standardize(
            log_attention(images.split(encoded.extras["cls_attention"])), images.mask
        )
        question = standardize(images.split(relevance(encoded)), images.mask)
        return diverse(self.a * attention + self.b * question, images, encoded, k)


@torch.no_grad()
def main() -> None:
    lvlm, dataset = Llava("tiny_crowd", device="cpu"), Crowd("val")
    samples = take(dataset, range(LIMIT))
    parts = [samples[i : i + 60] for i in range(0, LIMIT, 60)]
    extras = frozenset({"cls_attention", "word_attention", "pixels"})
    encoded = [lvlm.encode(part, extras) for part in parts]
    arms = {f"attention_dpp alpha={a}": AttentionDPPPruner(a) for a in (0.5, 1.0, 2.0, 4.0)}
    arms |= {f"question_dpp alpha={a}": QuestionDPPPruner(a) for a in (0.1, 0.3, 1.0, 3.0)}
    arms |= {f"keyword_color alpha={a}": KeywordColorPruner(a) for a in (0.5, 1.0, 2.0, 4.0)}
    arms |= {f"word_attention alpha={a}": WordAttentionPruner(a) for a in (0.5, 1.0, 2.0, 4.0)}
    arms |= {
        f"attention and question a={a} b={b}": AttentionQuestionDPP(a, b)
        for a in (0.5, 1.0)
        for b in (0.1, 0.3, 1.0)
    }
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
    never_look(dataset)


def never_look(dataset: Crowd) -> None:
    """The most frequent answer of the family, and to questions of one wording; learnt on `train`,
    scored on `final`."""
    by_family, by_wording = defaultdict(Counter), defaultdict(Counter)
    names = {
        "red",
        "green",
        "blue",
        "yellow",
        "purple",
        "cyan",
        "circle",
        "square",
        "triangle",
        "cross",
        "small",
        "large",
    }

    def wording(text: str) -> str:
        return " ".join("_" if word.strip("?") in names else word for word in text.split())

    for sample in take(dataset.__class__("train"), range(6000)):
        by_family[sample.family][sample.answers[0]] += 1
        by_wording[wording(sample.question)][sample.answers[0]] += 1
    final = take(dataset.__class__("final"), range(2000))
    for name, table, key in (
        ("family", by_family, lambda s: s.family),
        ("wording", by_wording, lambda s: wording(s.question)),
    ):
        scores = [dataset.score(s, table[key(s)].most_common(1)[0][0]) for s in final]
        print(f"the most frequent answer by {name}: {100 * sum(scores) / len(scores):.1f}")


if __name__ == "__main__":
    main()
