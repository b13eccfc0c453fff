"""A rule on the question's words, against what its base keeps."""

from dataclasses import replace

import pytest
import torch
from tests.helpers import toy_encoded, untrained_policy

from tprl.build import load_component
from tprl.errors import UserError
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.keyword_budget import KeywordBudget, load_keyword_budget

TABLE = {"how many": 3.0, "what color": 0.25}
ASKED = (
    "How many red circles?",
    "what size is it?",
    "what color is it?",
    "show many",
    "count: HOW MANY, what color",
)


def _encoded(questions: tuple[str, ...] = ASKED):
    return replace(
        toy_encoded([((12, 12),)] * len(questions), extras=["cls_attention"]), questions=questions
    )


def test_each_question_keeps_what_the_base_keeps_at_its_budget():
    encoded, base = _encoded(), AttentionDPPPruner()
    keep = KeywordBudget(base, TABLE, 0.5).select(encoded, 1 / 9).keep
    # "show many" is not "how many"; the first entry decides
    assert keep.sum(1).tolist() == [48, 8, 4, 8, 48]
    for row, multiple in enumerate((3.0, 0.5, 0.25, 0.5, 3.0)):
        assert torch.equal(keep[row], base.select(encoded, multiple / 9).keep[row])


def test_a_question_alone_gets_what_it_gets_in_a_batch():
    encoded, pruner = _encoded(), KeywordBudget(AttentionDPPPruner(), TABLE, 0.5)
    keep = pruner.select(encoded, 1 / 9).keep
    for row in range(len(ASKED)):
        assert torch.equal(pruner.select(encoded.rows([row]), 1 / 9).keep[0], keep[row])


def test_the_packaged_rule_keeps_its_mean_on_scenes():
    pruner = load_component("pruner", "keyword_budget")
    assert pruner.name == "attention_dpp_keyword"
    dataset = load_component("dataset", "scenes", split="val")
    multiples = [pruner.multiple(dataset[i].question) for i in range(100)]
    assert sum(multiples) / 100 == pytest.approx(1.0)
    assert sorted(set(multiples)) == [0.5, 3.0]
    assert all((dataset[i].family == "count") == (multiples[i] == 3.0) for i in range(100))


def test_flops_are_the_bases():
    policy = untrained_policy(16)
    on_policy, on_attention = (
        KeywordBudget(base, TABLE, 0.5) for base in (policy, AttentionDPPPruner())
    )
    assert on_policy.flops_by_part(144, 7, 8) == policy.flops_by_part(144, 7, 8)
    assert on_attention.flops_by_part(144, 7, 8) is None


def test_every_lvlm_tells_the_questions_text():
    for model, dataset in (("toy", "toy"), ("tiny_llava", "scenes")):
        samples = [load_component("dataset", dataset, split="val")[i] for i in range(2)]
        encoded = load_component("model", model).encode(samples)
        assert encoded.questions == tuple(sample.question for sample in samples)
        assert encoded.rows([1]).questions == (samples[1].question,)


def test_refusals():
    with pytest.raises(
        UserError, match=r"3 times keep_ratio=0\.5, .* use keep_ratio=0\.3333 or less"
    ):
        KeywordBudget(AttentionDPPPruner(), TABLE, 0.5).select(_encoded(), 0.5)
    with pytest.raises(UserError, match="this model gives no text: use attention_dpp"):
        KeywordBudget(AttentionDPPPruner(), TABLE, 0.5).select(
            replace(_encoded(), questions=()), 1 / 9
        )
    with pytest.raises(UserError, match=r"the multiple of 'otherwise' must be above 0, got 0\.0"):
        KeywordBudget(AttentionDPPPruner(), TABLE, 0.0)
    with pytest.raises(UserError, match="base=fastv drops tokens inside"):
        load_keyword_budget("fastv")
    with pytest.raises(UserError, match="merges tokens, which pooling_keyword cannot"):
        KeywordBudget(load_component("pruner", "pooling"), TABLE, 0.5).select(_encoded(), 1 / 9)
