"""Stage `distill`: the control of "why RL?". The same policy network, taught by the language
model's own gradient.

The pruning is made soft: every visual token stays in the sequence, and the language model's
attention to it is weighted by a gate in (0, 1); the gates of a sample sum to its budget and harden
as the temperature falls.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from tprl.budget import check_keep_ratio
from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import LearnedPruner
from tprl.pruners.serving import uniforms
from tprl.rl.rollout import step_budgets
from tprl.runtime import memory
from tprl.runtime.finite import check_finite
from tprl.scoring.ahead import Ready
from tprl.scoring.scorer import LIKELIHOOD, Scorer
from tprl.scoring.validation import ServedScore, merit
from tprl.stages.base import UNCALIBRATED, KeepBest, Next, Settings
from tprl.stages.prompts import drawn_ratios, prompt_loader, stepwise
from tprl.types import LVLM, Encoded, GatedLVLM

BISECTIONS = 40


class Distill(KeepBest):
    """Minimizes -log p(answer | gated tokens) through the frozen LVLM.

    What is trained is relevance, gate by gate; `policy.select` says what is served. Under dpp,
    diversity and the scale of the logits are not what the loss saw: compare with topk too.

    Args:
        pruner: the learner.
        lvlm, dataset: the frozen model, a `GatedLVLM`, and the training split.
        served: the validation score; the weights kept are those of its best value.
        iterations, prompts: training steps, and fresh questions in each.
        keep_ratio: kept fraction, or several (each question draws one).
        temperature: (first, last) of the gates; falls geometrically.
        noise: logistic noise on the logits, so that tokens near the threshold are tried both ways
            (1: the noise of a Bernoulli relaxation, 0: none).
        lr: Adam, annealed linearly to 0.
        grad_clip: largest norm of a gradient.
        validate_every: iterations between served scores.
        seed: prompts and noise.

    Raises:
        UserError: the LVLM has no gradient to teach with, or a keep ratio outside (0, 1].
    """

    overlays = True
    curve_titles: ClassVar = {"distill/loss": "distill, nats per answer token"}
    unread = (UNCALIBRATED,)
    next = Next("eval", "run", words=("pruners=[random,divprune]",))
    remembers = ("iteration", "best", "best_state")

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: BaseDataset,
        served: ServedScore,
        iterations: int,
        prompts: int,
        keep_ratio: float | Sequence[float],
        temperature: Sequence[float],
        noise: float,
        lr: float,
        grad_clip: float,
        validate_every: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pruner", "lvlm", "dataset", "served"])
        self.pruner, self.dataset, self.served = pruner, dataset, served
        if not isinstance(lvlm, GatedLVLM):
            raise UserError(
                "stage=distill cannot differentiate through model "
                f"{lvlm.name}: use model=tiny_llava or llava."
            )
        if isinstance(lvlm, FrozenLVLM):  # its layers may be of kinds that gates do not hide from
            lvlm.check_gates()
        ratios = [keep_ratio] if isinstance(keep_ratio, float | int) else keep_ratio
        self.lvlm: GatedLVLM = lvlm
        self.scorer = Scorer(lvlm, dataset, LIKELIHOOD)
        self.ratios = [check_keep_ratio(ratio) for ratio in ratios]
        self.max_grad_norm, self.iteration = grad_clip, 0
        self.begin_best()

    @classmethod
    def reads_answers(cls, reward: Any, settings: Settings) -> bool:
        return True

    @property
    def trained_to(self) -> float:
        """Largest keep ratio of the training."""
        return max(self.ratios)

    @property
    def samples_seen(self) -> int:
        """Questions read so far, on all ranks."""
        return self.iteration * self.hparams["prompts"]

    def setup(self, stage: str) -> None:
        self.pruner.train_only("net.", without="net.value_head")

    def train_dataloader(self) -> DataLoader[Ready]:
        return prompt_loader(self.lvlm, self.dataset, self.hparams, self.iteration)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.pruner.net.parameters(), lr=self.hparams["lr"], eps=1e-5)
        total = self.hparams["iterations"]

        def rate(step: int) -> float:
            return max(0.0, 1 - step / total)

        return stepwise(optimizer, rate)

    def training_step(self, batch: Ready, index: int) -> Tensor:
        h, samples = self.hparams, batch.samples
        if self.iteration % h["validate_every"] == 0:
            self._validate()
        encoded = batch.encode_in_parts(self.lvlm, self.pruner.extras)
        x = self.pruner.observe(encoded)
        # [I] how many tokens of each image the gates sum to.
        ratio = drawn_ratios(self.ratios, samples, h["seed"], self.iteration)
        images = x.images
        k = step_budgets(ratio[list(images.owners)], images.sizes, 1, 0).to(x.mask.device)
        # [B V] logits of the unpruned state, as when served.
        logits = self.pruner.net(x, x.mask, 0, ratio.to(x.mask.device))[0]
        # Gates harden: the temperature falls geometrically over the iterations.
        first, last = h["temperature"]
        temperature = first * (last / first) ** (self.iteration / max(1, h["iterations"] - 1))
        # Logistic noise, logit(u): with hard gates this would be a Bernoulli draw per token.
        keys = [f"{self.iteration}/{sample.uid}" for sample in samples]
        u = uniforms(keys, h["seed"], x.mask.shape[1]).to(logits.device)
        noisy = logits + h["noise"] * torch.logit(u, eps=1e-6)
        # [B V] gates of every image sum to its budget.
        gate = images.join(soft_top_k(images.split(noisy), images.mask, k, temperature), x.mask)
        log_prob = self._log_prob(encoded, gate, self.scorer.targets(samples, encoded))
        check_finite({"distill/loss": -log_prob}, encoded.uids, f"iteration {self.iteration}")
        loss = -log_prob.mean()
        # How far the gates are from a decision: 0 when all are 0 or 1.
        softness = (4 * gate * (1 - gate) * x.mask).sum() / x.mask.sum()
        metrics = {
            "distill/loss": loss,
            "distill/softness": softness,
            "distill/temperature": temperature,
        }
        self.log_dict(metrics, sync_dist=True)
        self.iteration += 1
        self.log("samples_seen", float(self.samples_seen))
        return loss

    def on_train_start(self) -> None:
        """A run that was stopped between its last step and the last score makes up for the
        score."""
        if self.iteration == self.hparams["iterations"]:
            self._validate()

    def _log_prob(
        self, encoded: Encoded, gate: Float[Tensor, "B V"], answers: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """Of the answers, differentiable in the gates. The gradient is taken a micro-batch at a
        time and joined to the gates: only one part's graph is ever in memory. Where GPU memory ends
        it starts again with half as many.

        Raises:
            UserError: there is not enough for one question.
        """
        size = min(self.lvlm.micro_batch, len(answers))
        while True:
            try:
                parts = [self._slope(encoded, gate, answers, rows) for rows in _cut(answers, size)]
                values, slopes = (torch.cat(part) for part in zip(*parts, strict=True))
                # Each row depends on its own gates alone; the second summand is 0, with a gradient.
                return values + (slopes * (gate - gate.detach())).sum(1)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(
                        f"{self.lvlm.name} has no memory for the gradient through a single "
                        "question: use model.max_pixels or model.max_tiles, "
                        "model.load_in=4bit or a GPU with more memory."
                    ) from error
            size = memory.half(size, "questions of a gradient")
            self.lvlm.micro_batch = size

    def _slope(
        self,
        encoded: Encoded,
        gate: Float[Tensor, "B V"],
        answers: Sequence[str],
        rows: Sequence[int],
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, "R V"]]:
        """Log-probabilities of some answers, and the gradient of each in its gates."""
        whole = len(rows) == len(answers)
        part = encoded if whole else encoded.rows(rows)
        leaf = gate[rows[0] : rows[-1] + 1].detach().requires_grad_()
        value = self.lvlm.gated_log_prob(part, leaf, [answers[i] for i in rows])
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    def on_train_epoch_end(self) -> None:
        self._validate()

    def _validate(self) -> None:
        score = self.served(self.pruner)
        self.log_dict({f"distill/served/{name}": value for name, value in score.items()})
        self.log("distill/served", score["accuracy"], prog_bar=True)
        self.log("samples_seen", float(self.samples_seen))
        self.keep_if_best(merit(score))


def _cut(answers: Sequence[str], size: int) -> list[range]:
    """Places of consecutive answers, `size` at a time."""
    starts = range(0, len(answers), size)
    return [range(start, min(start + size, len(answers))) for start in starts]


def soft_top_k(
    logits: Float[Tensor, "B V"],
    mask: Bool[Tensor, "B V"],
    k: Int[Tensor, " B"],
    temperature: float,
) -> Float[Tensor, "B V"]:
    """Gates sigmoid((logit - c) / temperature) with the offset c, one per row, at which they sum to
    k; 0 off the mask.

    c is found by bisection; its own derivative, sum(s dlogit) / sum(s) with s the slopes of the
    gates, is attached, so that raising one gate lowers the others.
    """
    # The sum of the gates falls with c, from all tokens to none between these bounds.
    low = logits.detach().masked_fill(~mask, torch.inf).amin(1) - 40 * temperature
    high = logits.detach().masked_fill(~mask, -torch.inf).amax(1) + 40 * temperature
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        gates = torch.sigmoid((logits.detach() - middle.unsqueeze(1)) / temperature) * mask
        many = gates.sum(1) > k
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    gates = torch.sigmoid((logits.detach() - high.unsqueeze(1)) / temperature) * mask
    # dc = sum(s dlogit) / sum(s): the logits move the offset, to first order.
    slope = gates * (1 - gates)
    moved = (slope * (logits - logits.detach())).sum(1) / slope.sum(1).clamp(min=1e-12)
    return torch.sigmoid((logits - (high + moved).unsqueeze(1)) / temperature) * mask
