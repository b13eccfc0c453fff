"""A policy that starts from attention."""

from pathlib import Path

import pytest
import torch
from tests.stages.test_lfd import lfd
from tests.stages.toy_runs import SMALL, fit, lvlm, policy, ppo

from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.learned import load_pruner
from tprl.scoring.validation import ServedScore
from tprl.types import Encoded


def encoded() -> Encoded:
    data = ToyDataset("val")
    batch = lvlm().encode([data[i] for i in range(6)], frozenset({"cls_attention"}))
    # Attention of the toy model knows two values; without ties, rounding decides nothing.
    attention = batch.extras["cls_attention"]
    noise = torch.rand(attention.shape, generator=torch.Generator().manual_seed(0))
    batch.extras["cls_attention"] = attention * (0.5 + noise)
    return batch


@pytest.mark.parametrize("ratio", [1 / 12, 0.25, 0.5])
def test_untrained_it_is_attention_dpp(ratio: float) -> None:
    start = policy(select="dpp", prior="attention", kernel="tokens")
    expected = AttentionDPPPruner(alpha=1.0).select(encoded(), ratio)
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


def test_demonstrations_and_an_unknown_prior_are_refused() -> None:
    with pytest.raises(UserError, match=r"from cls_attention, .* leave stage=lfd out"):
        lfd(policy(select="dpp", prior="attention"))
    with pytest.raises(UserError, match=r"policy\.prior must be one of none, .*, got query\."):
        policy(prior="query")
