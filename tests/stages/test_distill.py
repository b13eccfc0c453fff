"""Stage `distill`: its gates, and that the language model's gradient really teaches."""

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tprl.data.scenes import Scenes
from tprl.evaluation.served import ServedScore
from tprl.lvlm.llava import Llava
from tprl.pruners.tprl import TPRL
from tprl.stages.distill import Distill, soft_top_k

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
        assert torch.autograd.gradcheck(lambda values: soft_top_k(values, MASK, K, 0.7), (x,), atol=1e-5)


@pytest.mark.slow
def test_it_learns_what_the_language_model_needs() -> None:
    """From nothing, on the embedded LVLM: the served log-likelihood rises and the pruner is told by the question."""
    torch.manual_seed(0)
    lvlm = Llava("tiny_llava", device="cpu")
    pruner = TPRL(lvlm.width, code_width=0, width=32, heads=4, select="topk")
    served = ServedScore(lvlm, Scenes("val"), [0.1111], 60)
    before = served(pruner)["log_prob"]
    module = Distill(pruner, lvlm, Scenes(), served, iterations=60, prompts=16, keep_ratio=0.1111, validate_every=60)
    pl.Trainer(
        max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module)  # fmt: skip
    assert served(pruner)["log_prob"] > before + 0.1
