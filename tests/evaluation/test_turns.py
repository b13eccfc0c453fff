"""Conversations about one image: who keeps what in which turn, and what a cache would hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry
from tprl.evaluation.results import FULL
from tprl.evaluation.turns import Contender, arms_of, conversations, converse, rows_of_turns
from tprl.lvlm.prefixes import shared_prefix, visual_in
from tprl.pruners.keep_all import KeepAll
from tprl.scoring.scorer import Scorer
from tprl.splice import splice
from tprl.types import TokenSelection

RATIO = 1 / 3  # 12 of 36 tokens
FAMILIES = ["attribute", "existence", "count", "relation"]  # nothing is generated


def entry(name: str, *ratios: float) -> Entry:
    pruner = load_component("pruner", name)
    return Entry(pruner.name, pruner, ratios or (RATIO,))


@pytest.fixture(scope="module")
def answered() -> Any:
    """Two lengths of two conversations of every kind of arm, and the rows of the table."""
    dataset = Scenes("val", limit=8, families=FAMILIES)
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32")
    names = (FULL, "core_focus", "word_attention", "attention_dpp", "random")
    entries = [entry(FULL, 1.0), *(entry(name) for name in names[1:])]
    arms = arms_of(entries)
    scorer = Scorer(lvlm, dataset, frozenset({"score"}))
    turns, towers = converse(scorer, dataset, arms, (2, 4), ("read", "computed"))
    main = "attention_dpp+word_attention"
    return turns, towers, rows_of_turns(turns, towers, lvlm.name, dataset, main)


def of(rows: Any, arm: str, turns: int = 4, equal: str = "read", turn: int = 0) -> Any:
    """The one row."""
    key = arm, turns, equal, turn
    (row,) = [row for row in rows if (row.arm, row.turns, row.equal, row.turn) == key]
    return row


def test_arms_name_what_stays_between_turns() -> None:
    names = ("keep_all", "core_focus", "word_attention", "attention_dpp", "random")
    arms = arms_of([entry(name, 1.0 if name == FULL else RATIO) for name in names])
    assert [(arm.name, arm.stays, arm.held) for arm in arms] == [
        ("keep_all", 1.0, False),
        ("attention_dpp+word_attention", 0.5, False),
        ("word_attention", 0.0, False),
        ("word_attention, first question", 1.0, True),
        ("attention_dpp", 1.0, False),
        ("random", 1.0, True),
    ]


def test_the_formula_of_equal_tokens_is_what_is_counted(answered: Any) -> None:
    """Computed over a conversation: K (s + m (1 - s)) for a share s that stays, counted in the
    prompts up to the rounding of K and of the core, and to tokens that two foci begin with."""
    _, towers, rows = answered
    assert towers == 1.0
    for turns in (2, 4):
        for arm in ("attention_dpp", "random", "keep_all"):
            row = of(rows, arm, turns)
            assert row.computed == row.read / turns
            assert row.cached == row.read * (turns - 1) / turns
        for arm, share in (("attention_dpp+word_attention", 0.5), ("word_attention", 0.0)):
            for equal in ("read", "computed"):
                row = of(rows, arm, turns, equal)
                kept = row.read / turns
                expected = kept * (share + turns * (1 - share))
                assert expected - 3 * turns <= row.computed <= expected + turns
                assert row.computed + row.cached == row.read
        assert of(rows, "word_attention", turns).read == 12 * turns
        for arm in ("random", "attention_dpp"):
            assert of(rows, arm, turns, "computed").computed == min(12 * turns, 36)


def test_every_turn_has_its_row_and_the_whole_is_their_mean(answered: Any) -> None:
    turns, _, rows = answered
    row = of(rows, "attention_dpp+word_attention")
    parts = [of(rows, row.arm, turn=number) for number in (1, 2, 3, 4)]
    assert sum(part.accuracy for part in parts) / 4 == pytest.approx(row.accuracy)
    assert sum(part.read for part in parts) == pytest.approx(row.read)
    assert parts[0].cached == 0
    assert row.images == 2
    assert row.difference != row.difference  # nothing to compare the main arm with
    rival = of(rows, "random")
    assert rival.difference == pytest.approx(row.accuracy - rival.accuracy)
    # A short conversation is the beginning of the long one.
    for setting, answers in turns.items():
        if setting.turns == 2 and setting.equal == "read":
            longer = turns[setting._replace(turns=4)]
            beginning = [turn for turn in longer if turn.number <= 2]
            assert beginning == answers


def test_held_arms_keep_what_the_first_question_chose(answered: Any) -> None:
    _, _, rows = answered
    row = of(rows, "word_attention, first question")
    assert row.cached == 12 * 3
    first = of(rows, "word_attention", turn=1), of(rows, row.arm, turn=1)
    assert first[0].accuracy == first[1].accuracy


class TestPrefix:
    def test_ends_at_the_first_column_that_differs(self) -> None:
        encoded = toy_encoded([((4, 4),)]).rows([0, 0])
        at = int(encoded.visual_at[0, 0])
        keep = encoded.visual_mask.clone()
        keep[0, 2], keep[1, 5] = False, False
        prompt = splice(encoded, TokenSelection(keep))
        one, two = prompt.rows(torch.tensor([0])), prompt.rows(torch.tensor([1]))
        assert shared_prefix(one, two).tolist() == [at + 2]
        assert visual_in(two, torch.tensor([at + 2])).tolist() == [2]
        assert shared_prefix(one, one).tolist() == [int(one.attention.sum())]

    def test_positions_and_deeper_features_count(self) -> None:
        encoded = toy_encoded([((4, 4),)])
        deep = torch.randn(*encoded.embeds.shape[:2], 3)
        prompt = splice(replace(encoded, deep=deep), TokenSelection(encoded.visual_mask))
        moved = replace(prompt, positions=prompt.positions + (prompt.positions > 6))
        assert shared_prefix(prompt, moved).tolist() == [7]
        other = prompt.deep.clone()
        other[0, 5] += 1
        assert shared_prefix(prompt, replace(prompt, deep=other)).tolist() == [5]

    def test_padding_does_not_count(self) -> None:
        encoded = toy_encoded([((4, 4),), ((8, 8),)])
        prompt = splice(encoded, TokenSelection(encoded.visual_mask))
        alone = splice(encoded.rows([0]), TokenSelection(encoded.visual_mask[:1]))
        short = prompt.rows(torch.tensor([0]))
        assert shared_prefix(short, alone).tolist() == [int(alone.attention.sum())]


class TestRefusals:
    def test_too_few_questions_about_an_image(self) -> None:
        with pytest.raises(
            UserError,
            match=r"turns.lengths=8 needs an image with as many questions, and those of scenes "
            r"have at most 5: use turns.lengths=\[5\], or more rounds by dataset.rounds",
        ):
            conversations(Scenes("val", limit=20), 8)

    def test_methods_that_share_no_prompt(self) -> None:
        with pytest.raises(UserError, match="fastv drops tokens between layers"):
            arms_of([entry("fastv", 0.7)])
        with pytest.raises(UserError, match="random decides alone how many tokens live"):
            arms_of([Entry("random", load_component("pruner", "random"), (None,))])


def test_conversations_are_beginnings_of_one_order_of_different_questions() -> None:
    dataset = Scenes("val", limit=20, rounds=2)
    talks = conversations(dataset, 8)
    assert [sorted(talk)[0] // 10 for talk in talks] == [0, 1]
    assert all(len(set(talk)) == 8 for talk in talks)
    texts = [dataset[number].question for number in talks[0]]
    assert len(set(texts)) == 8


def test_equal_computed_tokens_never_exceed_the_image() -> None:
    blind = Contender("blind", Entry("keep_all", KeepAll(), (0.5,)), 1.0)
    assert blind.ratio(0.5, 8, "computed") == 1.0
    assert blind.ratio(0.5, 8, "read") == 0.5
