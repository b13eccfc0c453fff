import pytest
from tests.helpers import toy_encoded

from tprl.pruners.cls_attention import ClsAttentionPruner


@pytest.mark.parametrize("side", [12, 24])
@pytest.mark.parametrize("ratio", [1 / 3, 2 / 9, 1 / 9])
def test_keeps_the_most_attended(side, ratio):
    encoded = toy_encoded([((side, side),)] * 2, extras=["cls_attention"])
    keep = ClsAttentionPruner().select(encoded, ratio).keep
    for b in range(2):
        attention = encoded.extras["cls_attention"][b].tolist()
        best = sorted(range(side * side), key=lambda v, a=attention: (-a[v], v))
        assert keep[b].nonzero().squeeze(1).tolist() == sorted(best[: round(side * side * ratio)])


def test_ties_go_to_the_lower_index():
    encoded = toy_encoded([((3, 3),)], extras=["cls_attention"])
    encoded.extras["cls_attention"][0] = 1 / 9
    assert ClsAttentionPruner().select(encoded, 4 / 9).keep[0].int().tolist() == [
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]
