"""A policy that starts from attention."""

from pathlib import Path

import pytest
import torch
from tests.stages.test_lfd import lfd
from tests.stages.toy_runs import SMALL, fit, lvlm, policy, ppo
from tests.test_cost import LLAVA_7B

from tprl.build import load_component
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.pruners.learned import load_pruner
from tprl.pruners.quality import QualityDPP
from tprl.pruners.word_attention import listening_flops
from tprl.scoring.flops import choosing
from tprl.scoring.validation import ServedScore
from tprl.types import Encoded

# As configured: a rule whose yaml changes takes its prior with it, or this file fails.
RULES: dict[str, QualityDPP] = {
    "attention": load_component("pruner", "attention_dpp"),
    "attention_words": load_component("pruner", "attention_words"),
}


def encoded() -> Encoded:
    data = ToyDataset("val")
    batch = lvlm().encode([data[i] for i in range(6)], frozenset({"cls_attention"}))
    # Attention of the toy model knows two values; without ties, rounding decides nothing.
    attention, draw = batch.extras["cls_attention"], torch.Generator().manual_seed(0)
    batch.extras["cls_attention"] = attention * (0.5 + torch.rand(attention.shape, generator=draw))
    batch.extras["word_attention"] = torch.rand(attention.shape, generator=draw)
    return batch


@pytest.mark.parametrize("ratio", [1 / 12, 0.25, 0.5])
@pytest.mark.parametrize("prior", RULES)
@pytest.mark.parametrize("reads_prior", [True, False])
def test_untrained_it_is_the_rule(prior: str, reads_prior: bool, ratio: float) -> None:
    start = policy(select="dpp", prior=prior, reads_prior=reads_prior, kernel="tokens")
    expected = RULES[prior].select(encoded(), ratio)
    assert start.extras == RULES[prior].extras
    assert torch.equal(start.select(encoded(), ratio).keep, expected.keep)
    blind = policy(select="dpp", kernel="tokens").select(encoded(), ratio)
    assert not torch.equal(blind.keep, expected.keep)


def test_ppo_trains_what_is_added_and_the_folder_keeps_the_prior(tmp_path: Path) -> None:
    pruner = policy(select="dpp", prior="attention")
    served = ServedScore(lvlm(), ToyDataset("val"), (SMALL,), 12, extras=pruner.extras)
    fit(ppo(pruner, served=served))
    assert pruner.net.policy_head.out.weight.abs().sum() > 0
    pruner.save_pretrained(tmp_path)
    again = load_pruner(tmp_path)
    assert again.extras == {"cls_attention"}
    assert torch.equal(again.select(encoded(), 0.25).keep, pruner.select(encoded(), 0.25).keep)


def test_the_network_reads_the_scores_that_it_is_told_to_read() -> None:
    batch, other = encoded(), encoded()
    other.extras["word_attention"] = other.extras["word_attention"].flip(1)
    for reads_prior in (True, False):
        pruner = policy(select="dpp", prior="attention_words", reads_prior=reads_prior)
        torch.nn.init.normal_(pruner.net.policy_head.out.weight)
        learned = []
        for each in (batch, other):
            x = pruner.observe(each)
            learned.append(pruner.logits(x, 0.25) - x.prior)
        assert torch.allclose(*learned, atol=1e-5) is not reads_prior


def test_listening_is_paid_for() -> None:
    rule, deaf = RULES["attention_words"], policy(select="dpp", prior="attention")
    start = policy(select="dpp", prior="attention_words", reads_prior=True)
    # One linear layer of two scores, and what the rule pays to hear the words.
    heard = listening_flops(LLAVA_7B, 24)
    more = choosing(start, LLAVA_7B, [24], 3, [4]) - choosing(deaf, LLAVA_7B, [24], 3, [4])
    assert more == 2 * 24 * 2 * start.net.width + heard
    assert rule.flops(LLAVA_7B, 24, 4) > heard > 0


def test_demonstrations_and_an_unknown_prior_are_refused() -> None:
    with pytest.raises(UserError, match=r"from cls_attention, .* leave stage=lfd out"):
        lfd(policy(select="dpp", prior="attention"))
    with pytest.raises(UserError, match=r"policy\.prior must be one of none, .*, got query\."):
        policy(prior="query")
