"""Stage `pretrain`: it learns, resumes exactly, and leaves the tower alone once the language phase
has begun."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.stages.plain import build_stage
from torch import Tensor

from tprl.errors import UserError
from tprl.pretraining.losses import outside_loss, soft_cross_entropy
from tprl.pretraining.optimizing import ramp
from tprl.pretraining.packing import Pack
from tprl.pretraining.stage import Pretrain
from tprl.pretraining.tiny_llava import TinyLlava, build


def small() -> TinyLlava:
    return build(
        vision_width=32,
        vision_layers=2,
        patch=16,
        width=32,
        layers=2,
        heads=2,
        ffn=48,
        clip_width=16,
    )


def stage(vision_steps: int, language_steps: int, **options: Any) -> Pretrain:
    sizes: dict[str, Any] = {"vision_batch": 4, "language_batch": 2, "questions": 1, "workers": 0}
    return build_stage(
        Pretrain,
        parts=small(),
        vision_steps=vision_steps,
        language_steps=language_steps,
        **(sizes | options),
    )


class Diary(pl.Callback):
    """Loss and a copy of some weights after every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.tower: list[Tensor] = []
        self.reader: list[Tensor] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Pack,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, Pretrain)
        self.losses.append(float(outputs["loss"]))
        self.tower.append(flat(pl_module.llava.model.vision_tower))
        self.reader.append(flat(pl_module.llava.model.language_model))


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def fit(module: Pretrain, *callbacks: pl.Callback, resume: Path | None = None) -> Pretrain:
    h = module.hparams
    trainer = pl.Trainer(
        max_steps=h["vision_steps"] + h["language_steps"],
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
    )
    trainer.fit(module, ckpt_path=str(resume) if resume else None)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestTraining:
    @pytest.mark.slow
    def test_both_phases_learn_and_the_tower_rests_in_the_second(self) -> None:
        diary, vision, language = Diary(), 30, 30
        fit(stage(vision, language, lr_vision=4e-3, lr_language=4e-3), diary)
        losses = torch.tensor(diary.losses)
        assert len(losses) == vision + language
        assert losses[vision - 5 : vision].mean() < 0.9 * losses[:5].mean()
        assert losses[-5:].mean() < 0.9 * losses[vision : vision + 5].mean()
        assert not torch.equal(diary.tower[0], diary.tower[vision - 1])
        assert all(
            torch.equal(diary.tower[vision - 1], weights) for weights in diary.tower[vision:]
        )
        assert all(torch.equal(diary.reader[0], weights) for weights in diary.reader[:vision])
        assert not torch.equal(diary.reader[vision - 1], diary.reader[-1])

    @pytest.mark.parametrize("cut", [2, 4])
    def test_a_resumed_run_is_the_same_run(self, tmp_path: Path, cut: int) -> None:
        """Six steps across the border of the phases at step 3, at once and resumed after `cut` of
        them: bit-equal."""
        keep = ModelCheckpoint(
            tmp_path,
            "{step}",
            every_n_train_steps=2,
            save_top_k=-1,
            save_on_train_epoch_end=False,
            save_last=False,
        )
        whole_diary, rest_diary = Diary(), Diary()
        whole = fit(stage(3, 3), keep, whole_diary)
        other = stage(3, 3)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)  # everything must come out of the checkpoint
        resumed = fit(other, rest_diary, resume=tmp_path / f"step={cut}.ckpt")
        assert rest_diary.losses == whole_diary.losses[cut:]
        assert resumed.consumed == whole.consumed == 6
        a, b = whole.state_dict(), resumed.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)

    @pytest.mark.parametrize("steps", [(0, 2), (2, 0)])
    def test_a_phase_may_be_left_out(self, steps: tuple[int, int]) -> None:
        diary = Diary()
        fit(stage(*steps), diary)
        assert len(diary.losses) == 2
        assert all(map(math.isfinite, diary.losses))


def blank(batch: int, tokens: int) -> torch.Tensor:
    """Patches of images without objects."""
    return torch.zeros(batch, tokens, dtype=torch.bool)


@pytest.mark.parametrize("size", [{"layers": 1}, {"heads": 1}])
def test_a_model_too_small_for_looking_is_refused(size: dict[str, int]) -> None:
    sizes = {
        "vision_width": 32,
        "vision_layers": 2,
        "patch": 16,
        "width": 32,
        "layers": 2,
        "heads": 2,
    } | size
    with pytest.raises(UserError, match=r"needs two layers and two heads .* use two or more"):
        build_stage(Pretrain, parts=build(**sizes))


class TestKeptTokens:
    @pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.15, 0.25), (1.0, 0.3, 1.0)])
    def test_a_share_of_the_samples_prefers_objects(
        self, share: float, low: float, high: float
    ) -> None:
        """A fifth of the patches are objects: without preference a fifth of what is kept, with it
        clearly more."""
        module = stage(0, 400, full_share=0.0, object_share=share)
        front = blank(8, 100)
        front[:, :20] = True
        result = [
            float(front.gather(1, module.kept_tokens(step, front)).float().mean())
            for step in range(200, 260)
        ]
        assert low < sum(result) / len(result) < high

    def test_from_8_percent_to_all_in_raster_order(self) -> None:
        module = stage(10, 300, keep_low=0.08)
        counts = []
        for step in range(10, 310):
            kept = module.kept_tokens(step, blank(3, 100))
            assert (kept.diff(dim=1) > 0).all()
            assert kept.min() >= 0
            assert kept.max() < 100
            counts.append(kept.shape[1])
        late = torch.tensor(counts[100:])
        assert late.min() >= 8
        assert late.min() <= 15
        assert float((late == 100).float().mean()) == pytest.approx(0.2, abs=0.08)
        # sqrt(8 * 100)
        assert float(late[late < 100].float().quantile(0.5)) == pytest.approx(28, abs=6)

    def test_few_tokens_come_step_by_step(self) -> None:
        """Least kept shares at the start, after a sixth, and from a third of the phase on: 0.4,
        0.24, 0.08."""
        module = stage(0, 6000, full_share=0.0)
        lows = [
            min(module.kept_tokens(s, blank(1, 1000)).shape[1] for s in range(at, at + 150))
            for at in (0, 1000, 2000)
        ]
        assert lows == [pytest.approx(low, abs=25) for low in (400, 240, 80)]

    def test_a_step_decides_and_samples_differ(self) -> None:
        module = stage(0, 10, full_share=0.0)
        first = module.kept_tokens(7, blank(3, 50))
        assert torch.equal(first, module.kept_tokens(7, blank(3, 50)))
        assert not torch.equal(first[0], first[1])
        other = module.kept_tokens(8, blank(3, 50))
        assert other.shape != first.shape or not torch.equal(first, other)

    def test_all_tokens_when_asked_for(self) -> None:
        module = stage(0, 10, full_share=1.0)
        assert torch.equal(module.kept_tokens(9, blank(2, 36)), torch.arange(36).expand(2, -1))


class TestMathematics:
    @pytest.mark.parametrize(
        ("step", "total", "expected"),
        [
            (0, 1000, 1 / 200),
            (99, 1000, 0.5 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.099)))),
            (500, 1000, 0.505),
            (1000, 1000, 0.01),
            (1001, 1000, 0.0),
            (-1, 1000, 0.0),
            (0, 10, 0.5),  # short runs warm up over a fifth
            (5, 10, 0.505),
            (0, 1, 1.0),
            (0, 0, 0.0),
        ],
    )
    def test_ramp(self, step: int, total: int, expected: float) -> None:
        assert ramp(step, total) == pytest.approx(expected)

    def test_soft_cross_entropy_is_the_sum_over_a_gaussian(self) -> None:
        logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 2
        target = torch.tensor([[0, 3, 6], [2, 2, 5]])
        losses = soft_cross_entropy(logits, target, sigma=1.0, reduction="none")
        for i in range(2):
            for j in range(3):
                weights = [math.exp(-((k - int(target[i, j])) ** 2) / 2) for k in range(7)]
                total = math.log(sum(math.exp(float(x)) for x in logits[i, j]))
                expected = -sum(
                    w * (float(x) - total) for w, x in zip(weights, logits[i, j], strict=True)
                ) / sum(weights)
                assert float(losses[i, j]) == pytest.approx(expected, rel=1e-4)
        assert float(soft_cross_entropy(logits, target)) == pytest.approx(float(losses.mean()))

    def test_soft_cross_entropy_with_a_sharp_gaussian_is_cross_entropy(self) -> None:
        logits, target = (
            torch.randn(5, 9, generator=torch.Generator().manual_seed(1)),
            torch.tensor([0, 8, 4, 2, 2]),
        )
        expected = torch.nn.functional.cross_entropy(logits, target)
        assert float(soft_cross_entropy(logits, target, sigma=0.05)) == pytest.approx(
            float(expected), rel=1e-5
        )

    def test_a_near_miss_costs_less_than_a_far_one(self) -> None:
        logits = torch.zeros(3, 20).scatter(1, torch.tensor([[10], [11], [16]]), 5.0)
        exact, near, far = soft_cross_entropy(
            logits, torch.tensor([10, 10, 10]), reduction="none"
        ).tolist()
        assert exact < near < far

    def test_outside_loss_is_the_mass_that_is_not_on_numbers(self) -> None:
        logits = torch.tensor([[math.log(0.1), math.log(0.2), math.log(0.3), math.log(0.4)]])
        assert float(outside_loss(logits, torch.tensor([1, 3]))) == pytest.approx(-math.log(0.6))
        assert float(outside_loss(logits, torch.arange(4))) == pytest.approx(0.0, abs=1e-6)

    def test_both_box_losses_together_are_a_soft_cross_entropy_over_all_words(self) -> None:
        logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
        numbers, target = torch.arange(10, 30), torch.tensor([0, 3, 19, 7])
        both = soft_cross_entropy(logits[:, numbers], target, reduction="none") + outside_loss(
            logits, numbers
        )
        weights = torch.softmax(-((torch.arange(20) - target.unsqueeze(1)) ** 2) / 2.0, -1)
        expected = -(weights * logits.log_softmax(-1)[:, numbers]).sum(-1)
        assert torch.allclose(both, expected, atol=1e-5)
