"""Against plain loops in double precision."""

import math

import pytest
from tests.helpers import RAGGED, toy_encoded
from tests.pruners.test_quality import RATIOS, check, scores_by_hand

from tprl.pruners.attention_dpp import AttentionDPPPruner


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_attention_dpp_is_the_naive_loop(ratio, alpha):
    encoded = toy_encoded(RAGGED, width=64, extras=["cls_attention"])

    def log_q(b, members):
        return [
            alpha * z
            for z in scores_by_hand(
                [math.log(a) for a in encoded.extras["cls_attention"][b, members]]
            )
        ]

    check(AttentionDPPPruner(alpha), encoded, ratio, log_q)


def test_no_attention_fills_up_in_order():
    encoded = toy_encoded([((4, 4),)], extras=["cls_attention"])
    encoded.extras["cls_attention"][0, 3:] = 0.0
    assert AttentionDPPPruner().select(encoded, 3 / 16).keep[0].nonzero().squeeze(1).tolist() == [
        0,
        1,
        2,
    ]
