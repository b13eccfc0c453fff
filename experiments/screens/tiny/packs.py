"""Questions about pages, many behind one picture.

As in the packs of `tiny_llava`, a question sees the picture and itself, at the positions it would
have alone, so that ten of them cost little more than one.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LlavaProcessor

from tprl.data.screens import FAMILIES, POINTING

from .blueprint import CELLS, PATCH, SIDE, SPACE
from .labels import ICONS, IGNORE, coverage
from .pages import Item, Views, views

PROMPT = "USER: <image>\n{question} ASSISTANT:"
BEFORE, ASKED = PROMPT.split("<image>")
BETWEEN, AFTER = ASKED.split("{question}")
SPELLED = 0.1  # share of questions in which words of the list are spelled, as unknown ones are
MEANT = 0.25  # share of a patch that a box covers if the patch is to be looked at
# name nothing
LOOSE = frozenset(
    [
        "the",
        "is",
        "of",
        "in",
        "for",
        "on",
        "a",
        "what",
        "which",
        "how",
        "many",
        "there",
        "does",
        "say",
        "has",
    ]
)


class Pack(NamedTuple):
    """A batch of the second phase. C text columns (all questions of a page, padded), N patches."""

    views: Views
    text: Int[Tensor, "B C"]
    segment: Int[Tensor, "B C"]  # number of the question + 1; 0 = padding
    offset: Int[Tensor, "B C"]  # position in the question
    target: Int[Tensor, "B C"]  # next token where it is part of the answer, else IGNORE
    place: Float[Tensor, "B C"]  # the next token's coordinate, pixels; IGNORE where it is none
    family: Int[Tensor, "B C"]
    region: Bool[Tensor, "B G N"]  # for each segment, the patches that hold the answer
    named: Bool[Tensor, "B C N"]  # the patches that show what a word of a question names


class Packer:
    """Makes packs.

    Args:
        processor: of the model.
        questions: at most so many of a page.
    """

    def __init__(self, processor: LlavaProcessor, questions: int = 8) -> None:
        self.tokenizer, self.questions = processor.tokenizer, questions
        self.end = self.tokenizer.eos_token_id
        self.after = self._encoded(AFTER)
        self.words = self.tokenizer.get_vocab()
        self.icons = {self.words[SPACE + name]: number for number, name in enumerate(ICONS, 1)}
        self.loose = {self.words[SPACE + word] for word in LOOSE if SPACE + word in self.words}

    def before(self) -> list[int]:
        """Tokens in front of the picture."""
        return self.tokenizer(BEFORE).input_ids

    def pack(self, items: Sequence[Item], seed: int, step: int) -> Pack:
        batch = views(items)
        rng = np.random.default_rng([2, seed, step])
        asked = [self.chosen(item.questions, rng) for item in items]
        rows = [self._segments(questions, rng) for questions in asked]
        flat = _collate(rows)
        regions = [
            np.stack([np.zeros(CELLS**2, bool), *map(region, questions)]) for questions in asked
        ]
        size = max(map(len, regions))
        padded = np.stack([np.pad(mask, ((0, size - len(mask)), (0, 0))) for mask in regions])
        return Pack(batch, **flat, region=torch.from_numpy(padded), named=self._named(flat, batch))

    def chosen(
        self, questions: Sequence[dict[str, Any]], rng: np.random.Generator
    ) -> list[dict[str, Any]]:
        """Questions of different families first, in a random order."""
        order = rng.permutation(len(questions))
        turns: dict[str, int] = {}
        ranked = []
        for at in order:
            family = questions[at]["family"]
            turns[family] = turns.get(family, 0) + 1
            ranked.append((turns[family], len(ranked), questions[at]))
        return [row for *_, row in sorted(ranked, key=lambda rank: rank[:2])[: self.questions]]

    def _segments(
        self, questions: Sequence[dict[str, Any]], rng: np.random.Generator
    ) -> list[dict[str, Any]]:
        return [self.segment(row, bool(rng.random() < SPELLED)) for row in questions]

    def segment(self, row: dict[str, Any], spelled: bool = False) -> dict[str, Any]:
        """Tokens of a question and of its answer, and the coordinates among the latter."""
        point = row["family"] in POINTING
        box = [min(SIDE, max(0, round(value))) for value in row["bbox"]] if point else []
        answer = " ".join(map(str, box)) if point else row["answer"]
        question = (
            self.spell(row["instruction"])
            if spelled
            else self._encoded(BETWEEN + row["instruction"])
        )
        ids = [*self._encoded(answer), self.end]
        return {
            "question": question + self.after,
            "answer": ids,
            "place": box + [IGNORE] * (len(ids) - len(box)),
            "family": FAMILIES.index(row["family"]),
        }

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def spell(self, text: str) -> list[int]:
        """Tokens of letters, in which a word begins with a space."""
        pieces = re.findall(r"\s*\S", text.lower().strip())
        return [
            self.words.get(
                (SPACE if at == 0 or piece[0].isspace() else "") + piece.strip(),
                self.words["<unk>"],
            )
            for at, piece in enumerate(pieces)
        ]

    def _named(self, flat: dict[str, Tensor], batch: Views) -> Bool[Tensor, "B C N"]:
        text, target = flat["text"].unsqueeze(-1), flat["target"]
        visible = (batch.word.unsqueeze(1) == text) | (
            batch.name.unsqueeze(1) == text.unsqueeze(-1)
        ).any(-1)
        icons = torch.zeros(len(self.words), dtype=torch.long)
        for token, number in self.icons.items():
            icons[token] = number
        number = icons[flat["text"]].unsqueeze(-1)
        visible |= (number > 0) & (batch.icon.unsqueeze(1) == number)
        loose = torch.isin(flat["text"], torch.tensor(sorted(self.loose)))
        asking = (target == IGNORE) & (flat["segment"] > 0) & ~loose
        return visible & asking.unsqueeze(-1)


def region(row: dict[str, Any]) -> Bool[np.ndarray, " N"]:
    """Patches of the answer's box; of what is counted, those of each thing."""
    boxes = (
        row["region"][1:] if row["family"] == "count" and len(row["region"]) > 1 else [row["bbox"]]
    )
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    mask = coverage(boxes) >= MEANT
    centers = np.clip((boxes[:, :2] + boxes[:, 2:]) / 2 // PATCH, 0, CELLS - 1).astype(int)
    mask[np.arange(len(boxes)), centers[:, 1] * CELLS + centers[:, 0]] = True
    return mask.any(0)


def _collate(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Tensor]:
    """Questions side by side; a target sits on the token that predicts it."""
    blanks = {"text": 0, "segment": 0, "offset": 0, "target": IGNORE, "place": IGNORE, "family": 0}
    columns: dict[str, list[list[int]]] = {name: [] for name in blanks}
    for segments in rows:
        flat: dict[str, list[int]] = {name: [] for name in blanks}
        for number, part in enumerate(segments, 1):
            question, answer = part["question"], part["answer"]
            ids, quiet = question + answer[:-1], [IGNORE] * (len(question) - 1)
            flat["text"] += ids
            flat["segment"] += [number] * len(ids)
            flat["offset"] += range(len(ids))
            flat["target"] += quiet + answer
            flat["place"] += quiet + part["place"]
            flat["family"] += [part["family"]] * len(ids)
        for name, values in flat.items():
            columns[name].append(values)
    width = max(1, *(len(row) for row in columns["text"]))
    out = {
        name: torch.tensor([row + [blanks[name]] * (width - len(row)) for row in lists])
        for name, lists in columns.items()
    }
    out["place"] = out["place"].float()
    return out
