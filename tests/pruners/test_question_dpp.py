"""Against plain loops in double precision."""

import math
from dataclasses import replace

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.test_quality import RATIOS, check, scores_by_hand

from tprl.pruners.question_dpp import QuestionDPPPruner


@pytest.mark.parametrize("ratio", RATIOS)
def test_question_dpp_is_the_naive_loop(ratio):
    encoded, pruner = toy_encoded(RAGGED, width=64), QuestionDPPPruner(0.5)

    def log_q(b, members):
        words, tokens = (
            x.double().tolist()
            for x in (encoded.embeds[b, encoded.question[b]], encoded.visual[b, members])
        )
        assert words

        def cosine(x, y):
            return sum(i * j for i, j in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

        means = [sum(cosine(token, word) for word in words) / len(words) for token in tokens]
        return [0.5 * z for z in scores_by_hand(means)]

    check(pruner, encoded, ratio, log_q)
    assert pruner.reads_question


def test_other_words_choose_other_tokens_and_none_leave_diversity():
    encoded = toy_encoded([((12, 12),)], width=64)
    kept = QuestionDPPPruner(1.0).select(encoded, 1 / 9).keep
    other = encoded.embeds.clone()
    other[encoded.question] *= -1
    assert not torch.equal(
        QuestionDPPPruner(1.0).select(replace(encoded, embeds=other), 1 / 9).keep, kept
    )
    silent = replace(encoded, question=torch.zeros_like(encoded.question))
    diversity = QuestionDPPPruner(alpha=0.0).select(encoded, 1 / 9).keep
    assert torch.equal(QuestionDPPPruner().select(silent, 1 / 9).keep, diversity)
