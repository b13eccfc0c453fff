"""Learning from demonstrations: what is imitated, and that it is learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.stages.plain import build_stage
from tests.stages.toy_runs import LastWeights, Metrics, fit, lvlm, policy, same, served, weights

from tprl.budget import budget
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.pruners.base import BasePruner
from tprl.pruners.cls_attention import ClsAttentionPruner
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.mlp import MLPPruner
from tprl.pruners.uniform import UniformPruner
from tprl.scoring.validation import ServedScore
from tprl.stages.demonstrations import Demonstrations, demonstrate
from tprl.stages.lfd import LfD, set_loss, token_loss
from tprl.types import Encoded, TokenSelection

NOISE = torch.Generator()
QUARTER = 0.25  # 6 of 24 tokens: exactly the objects of a toy picture


def lfd(pruner: LearnedPruner | None = None, **options: Any) -> LfD:
    live: dict[str, Any] = {
        "pruner": pruner or policy(),
        "lvlm": lvlm(),
        "dataset": ToyDataset(),
        "demonstrator": ClsAttentionPruner(),
    }
    small: dict[str, Any] = {
        "demonstrations": 64,
        "keep_ratio": QUARTER,
        "epochs": 2,
        "batch_size": 16,
        "lr": 1e-2,
    }
    if "served" not in options:
        options["served"] = served()
    return build_stage(LfD, **(live | small | options))


def demonstrations(steps: int = 3, count: int = 20, **options: Any) -> Demonstrations:
    result = demonstrate(
        ClsAttentionPruner(), policy(), lvlm(), ToyDataset(), count, [0.25, 0.5], steps, **options
    )
    return result.rows(torch.arange(count))


class TestLoss:
    def test_equals_a_plain_loop_over_samples_steps_and_tokens(self) -> None:
        batch = demonstrations()
        pruner = policy()
        loss, _, agreement = token_loss(pruner, batch, NOISE)
        x = batch.x._replace(codes=batch.x.codes.float(), query=batch.x.query.float())
        errors, equal = torch.zeros(3, 20), torch.zeros(3, 20)
        for b in range(20):
            alive = batch.x.mask[b]
            for t in range(3):
                logits = pruner.net(
                    x.rows(torch.tensor([b])), alive[None], t, batch.keep_ratio[b : b + 1]
                )[0][0]
                kept = batch.keep[t, b]
                errors[t, b] = F.binary_cross_entropy_with_logits(
                    logits[alive], kept[alive].float()
                )
                equal[t, b] = ((logits[alive] > 0) == kept[alive]).float().mean()
                alive = kept
        assert float(loss.detach()) == pytest.approx(float(errors.mean().detach()), abs=1e-5)
        assert float(agreement) == pytest.approx(float(equal.mean()), abs=1e-5)

    def test_does_not_depend_on_the_order_of_the_batch(self) -> None:
        batch, pruner = demonstrations(), policy()
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        shuffled = Demonstrations(
            batch.x.rows(order), batch.keep[:, order], batch.keep_ratio[order]
        )
        for a, b in zip(
            token_loss(pruner, batch, NOISE), token_loss(pruner, shuffled, NOISE), strict=True
        ):
            assert float(a.detach()) == pytest.approx(float(b.detach()), abs=1e-6)

    def test_padding_changes_nothing(self) -> None:
        batch, pruner = demonstrations(), policy()
        x = batch.x._replace(
            codes=F.pad(batch.x.codes, (0, 0, 0, 5), value=9.0),
            xy=F.pad(batch.x.xy, (0, 0, 0, 5)),
            mask=F.pad(batch.x.mask, (0, 5)),
            query=F.pad(batch.x.query, (0, 0, 0, 2), value=-7.0),
            query_mask=F.pad(batch.x.query_mask, (0, 2)),
        )
        padded = Demonstrations(x, F.pad(batch.keep, (0, 5)), batch.keep_ratio)
        for a, b in zip(
            token_loss(pruner, batch, NOISE), token_loss(pruner, padded, NOISE), strict=True
        ):
            assert float(a.detach()) == pytest.approx(float(b.detach()), abs=1e-6)


class FarthestPruner(BasePruner):
    """Diverse and nothing else, and not a judgment of single tokens: every token is as far as
    possible from those chosen before, in the order of the first coordinate."""

    name, extras = "farthest", frozenset[str]()

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        rows = []
        for tokens in encoded.visual:
            x = F.normalize(tokens, dim=1)
            chosen = [int(x[:, 0].argmax())]
            while len(chosen) < budget(keep_ratio or 1.0, len(x)):
                chosen.append(int((x @ x[chosen].T).amax(1).argmin()))
            rows.append(
                torch.zeros(len(x), dtype=torch.bool).scatter(0, torch.tensor(chosen), True)
            )
        return TokenSelection(torch.stack(rows))


class TestSetLoss:
    def test_a_constant_is_no_better_than_itself(self) -> None:
        pruner = policy(select="dpp")
        with torch.no_grad():
            pruner.net.policy_head.out.weight.zero_()
        result = set_loss(pruner, demonstrations(), NOISE.manual_seed(0))
        assert float(result.loss.detach()) == pytest.approx(float(result.constant))

    @pytest.mark.parametrize(
        "demonstrator",
        [pytest.param(ClsAttentionPruner(), marks=pytest.mark.slow), FarthestPruner()],
        ids=lambda d: d.name,
    )
    def test_the_policy_gets_below_the_constant(self, demonstrator: Any) -> None:
        stage = lfd(
            policy(select="dpp", width=32),
            demonstrator=demonstrator,
            demonstrations=256,
            epochs=8,
            batch_size=32,
            served=served(24, [QUARTER]),
        )
        metrics = Metrics()
        fit(stage, metrics)
        loss, constant = (sum(metrics[f"lfd/{name}"][-8:]) / 8 for name in ("loss", "constant"))
        assert loss < 0.9 * constant
        assert sum(metrics["lfd/agreement"][-8:]) > sum(metrics["lfd/agreement"][:8])

    def test_a_stage_that_learns_nothing_says_so(self, caplog: pytest.LogCaptureFixture) -> None:
        fit(lfd(policy(select="dpp"), lr=0.0, epochs=1))
        assert "lfd: the policy has learned nothing from cls_attention" in caplog.text
        assert "that of constant logits" in caplog.text
        # the loss is set
        assert "Use another demonstrator (pruner=...), or more demonstrations." in caplog.text

    @pytest.mark.parametrize(
        ("options", "select", "message"),
        [
            ({"loss": "sets"}, "dpp", r"stage\.loss must be set or token, got sets; null takes"),
            ({"loss": "set"}, "topk", r"use stage\.loss=token\."),
        ],
    )
    def test_bad_losses_are_refused(self, options: Any, select: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            lfd(policy(select=select), **options)


class TestTraining:
    @pytest.mark.parametrize("kind", ["tprl", "mlp"])
    def test_imitates_a_heuristic(self, kind: str) -> None:
        pruner = policy() if kind == "tprl" else MLPPruner(24, code_width=0, width=16)
        stage = lfd(
            pruner, demonstrations=256, epochs=6, batch_size=32, served=served(120, [QUARTER])
        )
        metrics = Metrics()
        fit(stage, metrics)
        assert metrics["lfd/agreement"][0] < 0.85
        assert sum(metrics["lfd/agreement"][-8:]) / 8 > 0.95
        encoded = lvlm().encode(
            [ToyDataset("test")[i] for i in range(60)], frozenset({"cls_attention"})
        )
        wanted = ClsAttentionPruner().select(encoded, QUARTER).keep
        assert float((pruner.select(encoded, QUARTER).keep == wanted).float().mean()) > 0.95

    def test_imitates_every_step_of_progressive_demonstrations(self) -> None:
        """0.5 of 24, then half of it: objects and some noise, then the objects alone."""
        stage, metrics = (
            lfd(progressive=(0.5, 0.5), demonstrations=256, epochs=8, batch_size=32),
            Metrics(),
        )
        fit(stage, metrics)
        assert stage.demonstrations is not None
        assert stage.demonstrations.rows(torch.arange(256)).keep.sum(2).unique(dim=1).tolist() == [
            [12],
            [6],
        ]
        assert metrics["lfd/loss"][-1] < 0.6 * metrics["lfd/loss"][0]

    def test_the_best_served_weights_are_put_back(self) -> None:
        class Scripted(ServedScore):
            def __init__(self) -> None:
                self.seen: list[dict[str, torch.Tensor]] = []

            def __call__(self, pruner: Any) -> dict[str, float]:
                self.seen.append(weights(pruner))
                return {"accuracy": [0.2, 0.8, 0.4][len(self.seen) - 1], "log_prob": -1.0}

        scripted = Scripted()
        stage = lfd(served=scripted, epochs=3)
        fit(stage)
        assert not same(scripted.seen[0], scripted.seen[1])
        assert not same(scripted.seen[1], scripted.seen[2])
        assert same(weights(stage.pruner), scripted.seen[1])
        assert stage.curve == [(64.0, 0.2), (128.0, 0.8), (192.0, 0.4)]

    def test_only_the_policy_learns(self) -> None:
        stage, last = lfd(policy(code_width=8, hidden=16)), LastWeights()
        before = weights(stage.pruner)
        fit(stage, last)
        changed = {name for name in before if not torch.equal(before[name], last.weights[name])}
        assert any(name.startswith("net.blocks") for name in changed)
        assert not any(name.startswith(("autoencoder", "net.value_head")) for name in changed)

    def test_the_same_seed_gives_the_same_bits(self) -> None:
        ends = [LastWeights(), LastWeights(), LastWeights()]
        for end, seed in zip(ends, (0, 0, 1), strict=True):
            fit(lfd(seed=seed), end)
        assert same(ends[0].weights, ends[1].weights)
        assert not same(ends[0].weights, ends[2].weights)

    def test_two_epochs_and_two_resumed_equal_four(self, tmp_path: Path) -> None:
        saving = ModelCheckpoint(
            dirpath=tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1
        )
        ends = LastWeights(), LastWeights()
        whole, resumed = lfd(epochs=4), lfd(policy(5), epochs=4)
        fit(whole, ends[0], saving, enable_checkpointing=True)
        fit(resumed, ends[1], ckpt_path=tmp_path / "epoch=1.ckpt")
        assert resumed.samples_seen == 256
        assert same(ends[0].weights, ends[1].weights)
        assert same(weights(whole.pruner), weights(resumed.pruner))

    def test_learners_may_share_demonstrations(self) -> None:
        first = lfd()
        fit(first)
        second = lfd(policy(1), demonstrator=UniformPruner())
        second.demonstrations = first.demonstrations
        fit(second)
        assert second.demonstrations is first.demonstrations
