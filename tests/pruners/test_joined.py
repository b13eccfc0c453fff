"""Joined scores are each of their parts alone, and their sum."""

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.llava import Llava
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.joined import JoinedPruner
from tprl.pruners.keyword_color import KeywordColorPruner
from tprl.pruners.word_attention import WordAttentionPruner

ALONE = {
    "cls": AttentionDPPPruner(2.0),
    "words": WordAttentionPruner(2.0),
    "color": KeywordColorPruner(2.0),
}
EXTRAS = ["cls_attention", "word_attention", "rgb"]


@pytest.mark.parametrize("score", list(ALONE))
def test_one_weight_is_that_rule(score: str) -> None:
    encoded = toy_encoded(extras=EXTRAS)
    joined = JoinedPruner("test", {score: 2.0, "cls": 0.0} | {score: 2.0})
    assert joined.extras == ALONE[score].extras
    assert joined.reads_question == getattr(ALONE[score], "reads_question", False)
    expected = ALONE[score].select(encoded, 1 / 3).keep
    assert torch.equal(joined.select(encoded, 1 / 3).keep, expected)


def test_equal_scores_add_up_to_twice_the_weight_and_others_change_the_choice() -> None:
    encoded = toy_encoded(extras=EXTRAS)
    both = JoinedPruner("both", {"cls": 0.5, "words": 0.5})
    different = both.select(encoded, 1 / 3).keep
    encoded.extras["word_attention"] = encoded.extras["cls_attention"]
    alone = AttentionDPPPruner(1.0).select(encoded, 1 / 3).keep
    assert torch.equal(both.select(encoded, 1 / 3).keep, alone)
    assert not torch.equal(different, alone)


def test_only_words_cost_layers_of_the_language_model() -> None:
    shape = Llava("tiny_llava", device="cpu").shape
    words = load_component("pruner", "attention_words").flops(shape, 144, 16)
    color = load_component("pruner", "attention_color").flops(shape, 144, 16)
    assert words == WordAttentionPruner().flops(shape, 144, 16)
    assert color == AttentionDPPPruner().flops(shape, 144, 16)


@pytest.mark.parametrize(
    ("weights", "match"),
    [({"clip": 1.0}, "clip, which is no score"), ({"cls": 0.0}, "every weight of test is 0")],
)
def test_bad_weights_are_refused(weights: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=match):
        JoinedPruner("test", weights)
