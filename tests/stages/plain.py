"""Every hyper-parameter of the stages, so that a test names those it is about. Constructors have no
defaults of their own; `conf/stage` holds those of the command line, which are too large for
tests."""

from typing import Any

from tprl.pretraining.stage import Pretrain
from tprl.stages.adapt import Adapt
from tprl.stages.autoencoder import AutoencoderStage
from tprl.stages.base import Stage
from tprl.stages.distill import Distill
from tprl.stages.lfd import LfD
from tprl.stages.ppo import PPO
from tprl.stages.tune import Tune

SETTINGS: dict[type[Stage], dict[str, Any]] = {
    AutoencoderStage: {
        "images": 512,
        "epochs": 10,
        "batch_size": 256,
        "lr": 1e-4,
        "weight_decay": 0.01,
    },
    LfD: {
        "demonstrations": 5000,
        "keep_ratio": (0.3333, 0.2222, 0.1111),
        "steps": 1,
        "progressive": None,
        "loss": None,
        "epochs": 5,
        "batch_size": 128,
        "lr": 5e-5,
        "clip": 1.0,
    },
    PPO: {
        "iterations": 200,
        "prompts": 64,
        "group": 1,
        "keep_ratio": 1 / 3,
        "steps": 3,
        "budget": "exact_k",
        "law": "sequential",
        "advantage": "gae",
        "credit_blocks": None,
        "temperature": (1.0, 1.0),
        "discount": 0.5,
        "lr_actor": 1e-5,
        "lr_critic": 3e-5,
        "anneal": True,
        "minibatch": 16,
        "update_epochs": 4,
        "gamma": 0.99,
        "lam": 0.95,
        "clip": 0.2,
        "ratio": "token",
        "value_coef": 0.5,
        "entropy_coef": 0.01,
        "grad_clip": 0.5,
        "kl_stop": 0.03,
        "lr_lagrange": 0.1,
        "lagrange_gain": 5.0,
        "threshold_ratio": 0.25,
        "validate_every": 20,
    },
    Distill: {
        "temperature": (1.0, 0.2),
        "noise": 1.0,
        "lr": 2e-3,
        "grad_clip": 0.5,
        "validate_every": 50,
    },
    Adapt: {"epochs": 15, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.05},
    Tune: {
        "iterations": 2,
        "prompts": 4,
        "keep_ratio": 0.25,
        "answers": "reference",
        "rank": 4,
        "alpha": 8.0,
        "projector": False,
        "warmup": 0.05,
        "lr": 1e-2,
        "grad_clip": 1.0,
        "validate_every": 100,
    },
    Pretrain: {
        "vision_steps": 2000,
        "language_steps": 9000,
        "vision_batch": 64,
        "language_batch": 32,
        "questions": 2,
        "caption_steps": 1500,
        "lr_vision": 1e-3,
        "lr_language": 1.5e-3,
        "cls_look_weight": 0.2,
        "look_weight": 0.3,
        "full_share": 0.2,
        "keep_low": 0.08,
        "object_share": 0.5,
        "prefer": "objects",
        "next_weight": 0.0,
        "conjunction": False,
        "caption_every": 8,
        "world": "scenes",
        "compile": False,
        "workers": 1,
    },
}


def build_stage(kind: type[Stage], **options: Any) -> Any:
    """A stage of this class, or of a subclass of one above."""
    settings = next(settings for known, settings in SETTINGS.items() if issubclass(kind, known))
    return kind(**(settings | options))
