"""The adaptive mode: what it chooses, that it keeps what the policy keeps, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers import toy_encoded

from tprl.errors import UserError
from tprl.pruners.adaptive import Adaptive, choose, load_adaptive
from tprl.pruners.learned import load_pruner
from tprl.pruners.mlp import MLPPruner
from tprl.pruners.tprl import TPRL
from tprl.stages.adapt import calibrated_prices

BUDGETS = [0.1, 0.25, 0.5]


def policy(select: str = "dpp") -> TPRL:
    torch.manual_seed(0)
    base = TPRL(16, 8, hidden=12, width=16, layers=1, heads=2, select=select)
    base.learn_budgets(BUDGETS[::-1])
    with torch.no_grad():
        base.net.budget_head[-1].weight.mul_(30)  # type: ignore[index]  # so that forecasts differ
        base.net.policy_head.out.weight.mul_(200)
    base.serving = replace(base.serving, prices=((0.15, 1.0), (0.4, 0.1)), trained_to=0.1, fade=1.0)
    return base


ENCODED = toy_encoded([((6, 6),)] * 12)


class TestChoice:
    def test_tokens_are_bought_while_they_are_worth_their_price(self) -> None:
        chance = torch.tensor([[0.9, 0.9, 0.9], [0.1, 0.5, 0.9], [0.1, 0.5, 0.55]])
        budgets = torch.tensor([0.1, 0.2, 0.4])
        assert choose(chance, budgets, 0.0).tolist() == [0, 2, 2]
        assert choose(chance, budgets, 1.0).tolist() == [0, 2, 1]
        assert choose(chance, budgets, 3.0).tolist() == [0, 1, 1]
        assert choose(chance, budgets, 9.0).tolist() == [0, 0, 0]

    def test_the_calibrated_price_keeps_the_mean(self) -> None:
        chance = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)).cumsum(1) / 3
        pairs = calibrated_prices(chance, BUDGETS, (0.3, 0.15))
        assert [ratio for ratio, _ in pairs] == [0.15, 0.3]
        for ratio, price in pairs:
            kept = torch.tensor(BUDGETS)[choose(chance, torch.tensor(BUDGETS), price)].mean()
            assert float(kept) == pytest.approx(ratio, abs=0.002)
            assert price > 0

    def test_where_nothing_is_gained_the_mean_is_what_is_bought_for_nothing(self) -> None:
        assert calibrated_prices(torch.full((5, 3), 0.4), BUDGETS, (0.2, 0.3)) == [
            (pytest.approx(0.1), 0.0)
        ]


class TestSelect:
    def test_keeps_what_the_policy_keeps_at_the_chosen_budget(self) -> None:
        base = policy()
        x = base.observe(ENCODED)
        logits, read = base.survey(x)
        choice = choose(base.net.budget_logits(read).sigmoid(), torch.tensor(BUDGETS), 1.0)
        keep = Adaptive(base).select(ENCODED, 0.15).keep
        assert len(set(choice.tolist())) > 1
        for row, number in enumerate(choice.tolist()):
            assert torch.equal(keep[row], base.serve(x, logits, BUDGETS[number], ENCODED.uids)[row])
        assert keep.sum(1).tolist() == [round(BUDGETS[number] * 36) for number in choice.tolist()]

    @pytest.mark.parametrize("select", ["topk", "gumbel", "dpp"])
    def test_a_sample_alone_decides_as_in_its_batch(self, select: str) -> None:
        adaptive = Adaptive(policy(select))
        keep = adaptive.select(ENCODED, 0.15).keep
        for row in range(0, 12, 3):
            assert torch.equal(adaptive.select(ENCODED.rows([row]), 0.15).keep[0], keep[row])

    def test_a_higher_mean_keeps_more(self) -> None:
        adaptive = Adaptive(policy())
        counts = [int(adaptive.select(ENCODED, ratio).count.sum()) for ratio in (0.15, 0.25, 0.4)]
        assert counts == sorted(counts)
        assert counts[0] < counts[2]

    def test_logits_are_those_of_the_policy_at_the_middle_budget(self) -> None:
        base = policy()
        x = base.observe(ENCODED)
        assert torch.allclose(base.survey(x)[0], base.logits(x, (0.1 * 0.5) ** 0.5), atol=1e-6)

    def test_its_flops_are_the_policys_and_the_heads(self) -> None:
        base = policy()
        flops = Adaptive(base).flops_by_part(36, 7, 9)
        assert flops.pop("budget") == 2 * (32 * 16 + 16 * 3)
        assert flops == base.flops_by_part(36, 7, 9)


class TestRefusals:
    def test_a_policy_without_prices(self, tmp_path: Path) -> None:
        TPRL(16, 0, width=16, layers=1, heads=2).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"has learned no budgets: run stage=adapt"):
            load_adaptive(tmp_path)
        MLPPruner(16, 0).save_pretrained(tmp_path / "mlp")
        with pytest.raises(UserError, match="pruner mlp has no budget head"):
            load_adaptive(tmp_path / "mlp")

    @pytest.mark.parametrize("ratio", [0.1, 0.5])
    def test_a_mean_that_was_not_calibrated(self, ratio: float) -> None:
        with pytest.raises(UserError, match=r"calibrated for mean keep ratios from 0\.15 to 0\.4"):
            Adaptive(policy()).select(ENCODED, ratio)

    def test_no_mean_at_all(self) -> None:
        with pytest.raises(UserError, match="needs a keep_ratio in"):
            Adaptive(policy()).select(ENCODED, None)


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    base = policy()
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["budgets"] == BUDGETS
    assert torch.equal(
        load_adaptive(tmp_path).select(ENCODED, 0.2).keep, Adaptive(base).select(ENCODED, 0.2).keep
    )
    assert load_pruner(tmp_path).serving == base.serving
