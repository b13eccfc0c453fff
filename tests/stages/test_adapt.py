"""Stage `adapt`: the budget head learns what the questions need, and nothing else moves."""

import pytest
import torch
from tests.stages.plain import build_stage
from tests.stages.toy_runs import fit, lvlm, policy, served, weights

from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.pruners.adaptive import Adaptive, choose
from tprl.pruners.mlp import MLPPruner
from tprl.pruners.tprl import TPRL
from tprl.splice import splice
from tprl.stages.adapt import Adapt
from tprl.types import TokenSelection

BUDGETS = [1 / 24, 0.25, 0.5]


def stage(pruner: TPRL | MLPPruner | None = None, **options: object) -> Adapt:
    settings = {"questions": 60, "budgets": BUDGETS, "keep_ratios": [0.3], "epochs": 2} | options
    live = {
        "pruner": pruner or policy(select="dpp"),
        "lvlm": lvlm(),
        "dataset": ToyDataset(),
        "served": served(),
    }
    return build_stage(Adapt, **live, **settings)


def test_only_the_budget_head_moves_and_the_price_is_calibrated() -> None:
    pruner = policy(select="dpp")
    before = weights(pruner)
    module = stage(pruner)
    fresh = {name: value for name, value in weights(pruner).items() if "budget_head" in name}
    fit(module)
    after = weights(pruner)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(after[name], value) for name, value in fresh.items())
    encoded = [encoded for _, encoded in module.served.batches]
    ((mean, price),) = pruner.serving.prices
    kept = sum(int(Adaptive(pruner).select(e, mean).count.sum()) for e in encoded)
    assert kept / sum(int(e.visual_mask.sum()) for e in encoded) == pytest.approx(mean, abs=0.02)
    assert price >= 0


def test_held_out_questions_are_of_every_kind_and_about_other_images() -> None:
    module = stage(questions=40)
    read = torch.arange(40.0).unsqueeze(1)
    module._score = lambda: (read, read)  # type: ignore[method-assign]
    module.setup("fit")
    assert module.held_out.tensors[0].flatten().tolist() == [36, 37, 38, 39]
    assert len(module.train_data) == 36


def test_targets_are_the_answers_probabilities_as_served() -> None:
    pruner = policy(select="dpp")
    module = stage(pruner, questions=5)
    read, chance = module._score()
    samples = [ToyDataset()[i] for i in range(5)]
    encoded = lvlm().encode(samples)
    x = pruner.observe(encoded)
    logits, expected = pruner.survey(x)
    assert torch.equal(read, expected)
    for column, ratio in enumerate(BUDGETS):
        keep = pruner.serve(x, logits, ratio, encoded.uids)
        prompt = splice(encoded, TokenSelection(keep))
        log_prob = lvlm().score(prompt, [sample.answers[0] for sample in samples])[0]
        assert torch.allclose(chance[:, column], log_prob.exp())


def test_questions_that_need_tokens_get_them() -> None:
    """Half of the questions are hopeless below half of the tokens, the others are right with
    one."""
    pruner = policy(select="dpp")
    module = stage(pruner, epochs=40, questions=400)
    hard = torch.arange(400) % 2 == 0
    read = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    read[:, 0] = hard.float() * 4
    chance = torch.where(
        hard.unsqueeze(1), torch.tensor([0.1, 0.1, 0.9]), torch.tensor([0.9, 0.9, 0.9])
    )
    module._score = lambda: (read, chance)  # type: ignore[method-assign]
    fit(module)
    forecast = pruner.net.budget_logits(read).sigmoid()
    chosen = choose(forecast, torch.tensor(BUDGETS), 1.0)
    assert (chosen[hard] == 2).float().mean() > 0.95
    assert (chosen[~hard] == 0).float().mean() > 0.95


def test_what_it_cannot_teach() -> None:
    with pytest.raises(UserError, match="pruner mlp has no network for stage=adapt"):
        stage(MLPPruner(24, 0))
    with pytest.raises(UserError, match="leaves nothing to choose"):
        stage(budgets=[0.5])
    with pytest.raises(UserError, match="leaves nothing to choose"):
        stage(budgets=[0.5, 0.5])
    with pytest.raises(UserError, match="keep_ratio must be"):
        stage(budgets=[0.1, 1.7])
    with pytest.raises(UserError, match=r"must lie between the budgets, got 0\.6; give"):
        stage(keep_ratios=[0.6])
