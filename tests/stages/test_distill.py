"""Stage `distill`: its gates, and that the language model's gradient really teaches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.plain import build_stage
from tests.stages.toy_runs import SaveAt, fit, policy
from tests.stages.toy_runs import lvlm as lvlm_of_toys
from torch import Tensor

from tprl.data.scenes import Scenes
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.lvlm.llava import Llava
from tprl.pruners.tprl import TPRL
from tprl.scoring.validation import ServedScore
from tprl.stages.distill import Distill, soft_top_k
from tprl.types import Encoded

MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
K = torch.tensor([2, 3])


def logits(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


class TestSoftTopK:
    @pytest.mark.parametrize("temperature", [2.0, 0.3])
    def test_gates_sum_to_the_budget_and_follow_the_logits(self, temperature: float) -> None:
        gates = soft_top_k(logits(), MASK, K, temperature)
        assert gates.sum(1).tolist() == pytest.approx([2, 3], abs=1e-6)
        assert not gates[~MASK].any()
        assert ((gates >= 0) & (gates <= 1)).all()
        assert torch.equal(gates[0].argsort(), logits()[0].argsort())

    def test_cold_gates_are_top_k(self) -> None:
        gates = soft_top_k(logits(), MASK, K, 1e-3)
        for row, k in enumerate(K.tolist()):
            top = logits()[row].masked_fill(~MASK[row], -torch.inf).topk(k).indices
            assert gates[row, top].tolist() == pytest.approx([1.0] * k, abs=1e-6)

    def test_the_gradient_is_that_of_finite_differences(self) -> None:
        x = logits().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda values: soft_top_k(values, MASK, K, 0.7), (x,), atol=1e-5
        )


def tiny() -> tuple[TPRL, Llava]:
    torch.manual_seed(0)
    lvlm = Llava("tiny_llava", device="cpu")
    return TPRL(lvlm.width, code_width=0, width=32, heads=4, select="topk"), lvlm


def distill(questions: int = 5, **options: Any) -> Distill:
    """The stage over a small policy and the embedded LVLM, served on so many validation
    questions."""
    pruner, lvlm = tiny()
    served = ServedScore(lvlm, Scenes("val"), [0.1111], questions)
    usual = {
        "pruner": pruner,
        "lvlm": lvlm,
        "dataset": Scenes(),
        "served": served,
        "prompts": 3,
        "keep_ratio": 0.1111,
    }
    return build_stage(Distill, **(usual | options))


class TestStage:
    def test_a_step_moves_the_policy_and_nothing_else(self) -> None:
        module = distill(iterations=2, validate_every=9)
        pruner, lvlm = module.pruner, module.lvlm
        before = {name: value.clone() for name, value in pruner.state_dict().items()}
        model = [weight.clone() for weight in lvlm.model.parameters()]
        # no score beats it: what is restored at the end is what was there before
        module.best = float("inf")
        fit(module)
        assert all(torch.equal(value, before[name]) for name, value in pruner.state_dict().items())
        assert module.iteration == 2
        assert all(torch.equal(a, b) for a, b in zip(model, lvlm.model.parameters(), strict=True))
        module = distill(iterations=2, validate_every=9)
        pruner = module.pruner
        # the last weights are the best
        module._validate = lambda: setattr(module, "best_state", pruner.state_dict())
        fit(module)
        moved = [
            name
            for name, value in pruner.state_dict().items()
            if not torch.equal(value, before[name])
        ]
        assert any(name.startswith("net.blocks") for name in moved)
        assert not any("value_head" in name for name in moved)

    def test_micro_batches_change_neither_loss_nor_gradient(self) -> None:
        module = distill(iterations=1, prompts=5)
        lvlm: Any = module.lvlm
        samples, parts, read = [Scenes()[i] for i in range(5)], [], list[int]()
        encoded, plain = lvlm.encode(samples), lvlm.gated_log_prob

        def counted(encoded: Encoded, gate: Tensor, answers: Sequence[str]) -> Tensor:
            read.append(len(answers))
            return plain(encoded, gate, answers)

        lvlm.gated_log_prob = counted
        for lvlm.micro_batch in (64, 2):
            gate = (encoded.visual_mask * 0.3).requires_grad_()
            found = module._log_prob(encoded, gate, [sample.answers[0] for sample in samples])
            found.sum().backward()
            assert gate.grad is not None
            parts.append((found.detach(), gate.grad))
        assert read[:4] == [5, 2, 2, 1]
        torch.testing.assert_close(parts[0], parts[1], atol=1e-5, rtol=1e-4)

    def test_where_memory_ends_the_gradient_takes_fewer_questions(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = distill(iterations=1, prompts=5)
        lvlm: Any = module.lvlm
        samples, sizes, room = [Scenes()[i] for i in range(5)], list[int](), [2]
        encoded, plain = lvlm.encode(samples), lvlm.gated_log_prob
        answers = [sample.answers[0] for sample in samples]
        gate = encoded.visual_mask * 0.3
        whole = module._log_prob(encoded, gate, answers)

        def narrow(encoded: Encoded, gate: Tensor, answers: Sequence[str]) -> Tensor:
            sizes.append(len(answers))
            if len(answers) > room[0]:
                raise torch.OutOfMemoryError
            return plain(encoded, gate, answers)

        monkeypatch.setattr(lvlm, "gated_log_prob", narrow)
        torch.testing.assert_close(module._log_prob(encoded, gate, answers), whole)
        assert sizes == [5, 3, 2, 2, 1]
        room[0] = 0
        with pytest.raises(UserError, match="no memory for the gradient through a single question"):
            module._log_prob(encoded, gate, answers)

    def test_where_memory_is_short_a_graph_keeps_what_layers_read_and_no_more(self) -> None:
        _, lvlm = tiny()
        samples = [Scenes()[i] for i in range(2)]
        encoded, answers = lvlm.encode(samples), [sample.answers[0] for sample in samples]
        kept, gradients = [], []
        for lvlm.working_gib in (0.0, 2.0):
            sizes = list[int]()

            def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(x.nbytes)
                return x

            gate = (encoded.visual_mask * 0.3).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                value = lvlm.gated_log_prob(encoded, gate, answers).sum()
            value.backward()
            kept.append(sum(sizes))
            gradients.append(gate.grad)
        assert kept[0] < kept[1] / 3
        assert torch.equal(*gradients)
        assert "forward" not in vars(lvlm.model.model.language_model.layers[0])

    @pytest.mark.slow
    def test_a_resumed_run_is_the_run(self, tmp_path: Path) -> None:
        whole, second = (
            distill(iterations=4, keep_ratio=[0.2222, 0.1111], validate_every=2) for _ in range(2)
        )
        fit(whole, SaveAt(2, tmp_path / "two.ckpt"))
        fit(second, ckpt_path=tmp_path / "two.ckpt")
        assert second.iteration == whole.iteration == 4
        assert second.best == whole.best
        assert whole.best_state.keys() == second.best_state.keys() > set()
        for (name, value), resumed in zip(
            whole.best_state.items(), second.best_state.values(), strict=True
        ):
            assert torch.equal(value, resumed), name
        moments = [
            module.optimizers(use_pl_optimizer=False).state_dict()["state"]
            for module in (whole, second)
        ]  # type: ignore[union-attr]
        assert moments[0].keys() == moments[1].keys() > set()
        assert all(
            torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"])
            for key in moments[0]
        )

    def test_a_model_without_gradient_is_refused(self) -> None:
        model = lvlm_of_toys()
        served = ServedScore(model, ToyDataset("val"), [0.5], 2)
        with pytest.raises(UserError, match="cannot differentiate through model toy"):
            build_stage(
                Distill,
                pruner=policy(),
                lvlm=model,
                dataset=ToyDataset(),
                served=served,
                iterations=1,
                prompts=1,
                keep_ratio=0.5,
            )


@pytest.mark.slow
def test_it_learns_what_the_language_model_needs() -> None:
    """From nothing, on the embedded LVLM: the served log-likelihood rises."""
    module = distill(60, iterations=60, prompts=16, validate_every=60)
    before = module.served(module.pruner)["log_prob"]
    fit(module)
    assert module.served(module.pruner)["log_prob"] > before + 0.1
