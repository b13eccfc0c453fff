"""Conversations of several questions about one image: accuracy and tokens of every turn, for
pruners that choose anew, that keep one set, that share a core, or that keep everything."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import torch

from tprl.data.base import BaseDataset
from tprl.data.taking import numbered, take
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry
from tprl.evaluation.results import FULL
from tprl.evaluation.statistics import Interval, image_key, interval, paired_interval
from tprl.lvlm.layer_drop import LayerPruner
from tprl.lvlm.prefixes import shared_prefix, visual_in
from tprl.pruners.chunks import select_in_chunks
from tprl.runtime import memory
from tprl.scoring.scorer import Scorer
from tprl.splice import splice
from tprl.types import Encoded, Sample, TokenSelection

READ, COMPUTED = "read", "computed"  # what is equal between the arms of a conversation
HELD = "first question"  # arms that keep what the first question of a conversation chose


@dataclass(frozen=True)
class Contender:
    """A pruner in a conversation.

    Attributes:
        stays: the share of its tokens that is the same in every turn: 0 where every question
            chooses anew, 1 where one set serves all.
        held: every turn keeps what the first one chose.
    """

    name: str
    entry: Entry
    stays: float
    held: bool = False

    def ratio(self, keep_ratio: float, turns: int, equal: str) -> float:
        """The kept fraction of each turn at which the arm has the tokens of one that chooses anew
        at `keep_ratio`: as many read, or as many computed over the conversation.

        Computed are its tokens once, and in each turn after the first those that did not stay:
        K (stays + turns (1 - stays)) of K tokens a turn.
        """
        if self.name == FULL:
            return 1.0
        if equal == READ:
            return keep_ratio
        return min(1.0, keep_ratio * turns / (self.stays + turns * (1 - self.stays)))


class Turn(NamedTuple):
    """One answered question."""

    image: str
    uid: str
    number: int  # of the turn, from 1 on
    score: float
    read: int  # visual tokens in the prompt
    cached: int  # those of them whose keys and values the turn before had computed


class TurnSetting(NamedTuple):
    """One conversation length of one arm at one budget."""

    arm: str
    seed: int
    turns: int
    equal: str
    keep_ratio: float  # of an arm that chooses anew
    ratio: float  # of this one


@dataclass(frozen=True)
class TurnRow:
    """One line of `turns.csv`: a turn, or with `turn` 0 the whole conversation.

    Tokens are means per turn, of whole conversations sums; `difference` is the main arm minus this
    one, over the same questions.
    """

    model: str
    dataset: str
    arm: str
    seed: int
    turns: int
    equal: str
    keep_ratio: float
    ratio: float
    turn: int
    images: int
    accuracy: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    read: float
    computed: float
    cached: float
    tower_runs: float


def arms_of(entries: Sequence[Entry]) -> list[Contender]:
    """The arms that entries make: one that reads the question also as what its first question
    chose.

    Raises:
        UserError: a method between layers, or one that decides alone how many tokens it keeps.
    """
    arms = []
    for entry in entries:
        pruner: Any = entry.pruner
        if isinstance(pruner, LayerPruner):
            raise UserError(
                f"{entry.name} drops tokens between layers, so its turns share no prompt: leave it "
                "out of mode=turns."
            )
        if None in entry.keep_ratios:
            raise UserError(
                f"{entry.name} decides alone how many tokens live, and conversations are compared "
                "at equal tokens: leave it out of mode=turns."
            )
        share = pruner.core_share
        reads = pruner.reads_question or "region" in pruner.extras
        if share is not None:
            arms.append(Contender(entry.name, entry, share))
        elif reads:
            arms.append(Contender(entry.name, entry, 0.0))
            arms.append(Contender(f"{entry.name}, {HELD}", entry, 1.0, held=True))
        else:
            # One that draws would draw anew for every question: the first draw is kept.
            arms.append(Contender(entry.name, entry, 1.0, held=pruner.seed is not None))
    return arms


def conversations(
    dataset: BaseDataset, turns: int, limit: int | None = None, seed: int = 0
) -> list[list[int]]:
    """Numbers of `turns` questions about each image of the first `limit` questions, in an order of
    their own: a conversation of fewer turns is the beginning of it.

    Raises:
        UserError: no image has that many.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, sample in numbered(dataset, range(min(limit or len(dataset), len(dataset)))):
        numbers[image_key(sample.uid)].append(number)
    most = max(map(len, numbers.values()), default=0)
    if most < turns:
        rounds = ", or more rounds by dataset.rounds" if dataset.rounds else ""
        raise UserError(
            f"turns.lengths={turns} needs an image with as many questions, and those of "
            f"{dataset.name} have at most {most}: use turns.lengths=[{max(most, 1)}]{rounds}."
        )
    chosen = []
    for key, questions in numbers.items():
        if len(questions) >= turns:
            chosen.append(random.Random(f"{seed}/{key}").sample(questions, turns))
    return chosen


def converse(
    scorer: Scorer,
    dataset: BaseDataset,
    arms: Sequence[Contender],
    lengths: Sequence[int],
    equals: Sequence[str],
    limit: int | None = None,
    batch_size: int = 32,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[TurnSetting, list[Turn]], float]:
    """Answer every conversation in every setting; and how often the vision tower ran per
    conversation, counted in images.

    Raises:
        UserError: see `conversations`.
    """
    most = max(lengths)
    talks = conversations(dataset, most, limit)
    extras = frozenset().union(*(arm.entry.pruner.extras for arm in arms))
    # All tokens stand in the table of every budget.
    others = chain.from_iterable(arm.entry.keep_ratios for arm in arms if arm.name != FULL)
    budgets = sorted({ratio for ratio in others if ratio is not None}, reverse=True) or [1.0]
    turns: dict[TurnSetting, list[Turn]] = defaultdict(list)
    looks = _Looks(scorer.lvlm)
    done = 0
    with looks:
        size = max(1, batch_size // most)
        for start in range(0, len(talks), size):
            some = talks[start : start + size]
            numbers = list(chain.from_iterable(some))
            samples = take(dataset, numbers)
            encoded = scorer.lvlm.encode(samples, extras)
            batch = _Batch(scorer, samples, encoded, most)
            # Longest first: at equal ratios shorter conversations are known then.
            for arm, length, equal in product(arms, sorted(lengths, reverse=True), equals):
                for keep_ratio in budgets if arm.name == FULL else arm.entry.keep_ratios:
                    assert keep_ratio is not None
                    ratio = arm.ratio(keep_ratio, length, equal)
                    setting = TurnSetting(
                        arm.name, arm.entry.seed, length, equal, keep_ratio, ratio
                    )
                    turns[setting] += batch.answered(arm, ratio, length)
            done += len(some)
            tick(done, len(talks))
    return dict(turns), looks.images / len(talks)


class _Looks:
    """While it lasts, counts the images that pass the vision tower."""

    def __init__(self, lvlm: Any) -> None:
        self.lvlm, self.images = lvlm, 0
        self._look = lvlm.look

    def __enter__(self) -> None:
        if self._look is not None:
            self.lvlm.look = self._counted

    def __exit__(self, *error: object) -> None:
        if self._look is not None:
            del self.lvlm.look

    def _counted(self, *arguments: Any) -> Any:
        assert self._look is not None
        seen = self._look(*arguments)
        self.images += len(seen.tokens)
        return seen


class _Batch:
    """Some conversations of `most` turns, encoded once; what an arm answers at a ratio is kept,
    because shorter conversations are the beginnings of longer ones."""

    def __init__(self, scorer: Scorer, samples: list[Sample], encoded: Encoded, most: int) -> None:
        self.scorer, self.samples, self.encoded, self.most = scorer, samples, encoded, most
        self._known: dict[tuple[str, int, float], dict[int, Turn]] = {}

    def answered(self, arm: Contender, ratio: float, length: int) -> list[Turn]:
        """The first `length` turns of each conversation."""
        key = arm.name, arm.entry.seed, ratio
        rows = [i for i in range(len(self.samples)) if i % self.most < length]
        missing = [i for i in rows if i not in self._known.setdefault(key, {})]
        if missing:
            # Whole conversations: a turn counts what the one before it left in the cache.
            fresh = self._answer(arm, ratio, rows, length)
            self._known[key].update(zip(rows, fresh, strict=True))
        return [self._known[key][i] for i in rows]

    def _answer(self, arm: Contender, ratio: float, rows: list[int], length: int) -> list[Turn]:
        encoded, samples = self.encoded.rows(rows), [self.samples[i] for i in rows]
        selection = self._selection(arm, encoded, ratio, length)
        prompt = splice(encoded, selection)
        scores = self.scorer(samples, prompt).score.tolist()
        read = prompt.visual.sum(1).tolist()
        # [N] what row i shares with row i - 1; a first turn shares nothing.
        later = torch.arange(1, len(rows), device=prompt.visual.device)
        cached = [0] * len(rows)
        if len(later):
            after = prompt.rows(later)
            prefix = shared_prefix(prompt.rows(later - 1), after)
            counts = visual_in(after, prefix).tolist()
            for row, count in enumerate(counts, 1):
                cached[row] = count if row % length else 0
        turns = []
        for row, sample in enumerate(samples):
            image = image_key(sample.uid)
            place = row % length + 1
            turns.append(Turn(image, sample.uid, place, scores[row], read[row], cached[row]))
        return turns

    def _selection(
        self, arm: Contender, encoded: Encoded, ratio: float, length: int
    ) -> TokenSelection:
        pruner: Any = arm.entry.pruner
        budget = memory.working_bytes(self.scorer.lvlm)
        if not arm.held:
            return select_in_chunks(pruner, encoded, ratio, budget)
        first = list(range(0, len(encoded), length))
        selection = select_in_chunks(pruner, encoded.rows(first), ratio, budget)
        if selection.merged is not None or selection.extra is not None:
            raise UserError(
                f"{pruner.name} merges tokens for its question, so they cannot be kept for "
                "another: leave it out of mode=turns."
            )
        return TokenSelection(selection.keep.repeat_interleave(length, 0))


def rows_of_turns(
    turns: dict[TurnSetting, list[Turn]], towers: float, model: str, dataset: BaseDataset, main: str
) -> list[TurnRow]:
    """Accuracy with a 95 % bootstrap interval over images, tokens, and the difference to the arm
    `main` at the same budget, of every turn and of whole conversations."""
    rows = []
    for setting, answered in turns.items():
        rival = [
            other
            for other in turns
            if other.arm == main and other[2:5] == setting[2:5] and setting.arm != main
        ]
        compared = turns[rival[0]] if rival else None
        for number in range(setting.turns + 1):
            row = _row(setting, answered, compared, number)
            cells: list[Any] = [model, dataset.name, *row, towers]
            rows.append(TurnRow(*cells))
    return rows


def _row(
    setting: TurnSetting, answered: Sequence[Turn], compared: Sequence[Turn] | None, number: int
) -> tuple[Any, ...]:
    """Turn `number`, or with 0 all of them."""
    part = [turn for turn in answered if number in (0, turn.number)]
    images = [turn.image for turn in part]
    scores = np.array([turn.score for turn in part])
    count = len(set(images))
    accuracy = interval(scores, images)
    difference = Interval(float("nan"), float("nan"), float("nan"))
    if compared is not None:
        others = [turn for turn in compared if number in (0, turn.number)]
        assert all(a.uid == b.uid for a, b in zip(others, part, strict=True))
        other_scores = np.array([turn.score for turn in others])
        difference = Interval(*paired_interval(other_scores, scores, images)[:3])
    # Sums over a conversation, means over a turn: either way a number per image.
    read = sum(turn.read for turn in part) / count
    cached = sum(turn.cached for turn in part) / count
    tokens = read, read - cached, cached
    return (*setting, number, count, *accuracy, *difference, *tokens)
