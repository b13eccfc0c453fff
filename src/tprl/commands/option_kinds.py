"""The table of options: what each may hold, and what decides arguments that are no options."""

from typing import Any

from tprl.build import choices
from tprl.commands.annotated import FINITE
from tprl.commands.stages import BUILT_FROM
from tprl.kinds import (
    LARGEST,
    Kind,
    Listed,
    Number,
    OneOf,
    anything,
    flag,
    text,
    text_or_null,
)
from tprl.lvlm.batching import check_template

RATIO = Number(
    0,
    1,
    above=True,
    example="0.333",
)
COUNT = Number(1, LARGEST, whole=True, example="8")
FROM_ZERO = Number(0, LARGEST, whole=True)
MAYBE_COUNT = Number(1, LARGEST, whole=True, example="20", null="never")
SEED = Number(0, 2**32 - 1, whole=True, example="0")
POSITIVE = Number(0, above=True, example="0.001")
NOT_NEGATIVE = Number(0, example="0.1")
SHARE = Number(0, 1, example="0.5")
CONFIDENCE = Number(0, 1, above=True, below=True, example="0.9")
LIMIT = Number(
    1,
    LARGEST,
    whole=True,
    null="the whole split",
    example="1000",
)
RATIOS = Listed(RATIO, purpose="keep")
# (first, last); one number stays the same throughout
PAIR = Listed(Number(0, above=True, example="1.0"), exactly=2)


def component(group: str) -> OneOf:
    """The name of a yaml of a group."""
    return OneOf(lambda: choices(group), group=True)


def devices(key: str, value: Any) -> Any:
    """Of Lightning's Trainer: a number, -1 or auto for all; a list is refused where the policy
    meets its LVLM."""
    if value in ("auto", -1) or isinstance(value, list):
        return value
    return Number(1, LARGEST, whole=True, example="1, or -1 for all")(key, value)


def template(key: str, value: Any) -> str | None:
    """Of prompts."""
    return check_template(value)


PRUNERS = Listed(component("pruner"), least=0, distinct=True)
# A component of one's own says its bounds in an annotation instead, see `kind_of`. By the end of an
# option's full name; the longest end counts. Of a stage the full name begins with its own name,
# also where one types `stage.`.
KINDS: dict[str, Kind] = {
    # what is measured
    "mode": OneOf(("accuracy", "turns", "calibrate", "parity", "selectors", "latency")),
    "retention": Number(0, 1, above=True, example="0.98", null="keep ratios as they are given"),
    "confidence": CONFIDENCE,
    "calibrate.split": text,
    "calibrate.labels": flag,
    "calibrate.keep_ratios": Listed(RATIO, distinct=True, purpose="choose from"),
    "models": Listed(component("model"), least=0, null=True, distinct=True),
    "pruners": PRUNERS,
    "baselines": Listed(component("policy"), least=0, distinct=True),
    "evaluation.datasets": Listed(component("dataset"), least=0, distinct=True),
    "keep_ratios": Listed(RATIO, distinct=True, purpose="evaluate"),
    "keep_ratio": Listed(RATIO, single=True, purpose="keep"),
    "limit": LIMIT,
    "seeds": Listed(SEED, distinct=True, purpose="draw with"),
    "seed": SEED,
    "batch_size": Number(1, LARGEST, whole=True, example="32"),
    "threads": Number(
        1,
        LARGEST,
        whole=True,
        null="a choice by the model",
    ),
    "turns.lengths": Listed(
        Number(1, LARGEST, whole=True, example="4"), distinct=True, purpose="ask"
    ),
    "turns.equal": Listed(OneOf(("read", "computed")), distinct=True, purpose="compare by"),
    "latency.batch_sizes": Listed(COUNT, distinct=True, purpose="time"),
    "latency.image": Listed(Number(1, 2**15, whole=True, example="672"), exactly=2),
    "latency.repeats": COUNT,
    "latency.warmup": FROM_ZERO,
    "latency.text_tokens": COUNT,
    "latency.new_tokens": COUNT,
    # where things are
    **dict.fromkeys(
        ("run", "sweep", "study", "resume", "cache", "init_from", "calibration"), text_or_null
    ),
    **dict.fromkeys(("runs", "compare"), anything),
    **dict.fromkeys(("split", "host", "name"), text),
    # the demo
    **dict.fromkeys(("demo.keep_ratio", "export.keep_ratio"), RATIO),
    "examples": Number(1, LARGEST, whole=True, example="6"),
    "port": Number(
        1,
        2**16 - 1,
        whole=True,
        null="the first free one",
        example="7860",
    ),
    "share": flag,
    "deterministic": flag,
    # the export
    "export.target": OneOf(("vllm", "openvino")),
    "export.positions": OneOf(("keep", "compact")),
    "export.weights": OneOf(("f32", "int8")),
    # stages
    **dict.fromkeys(
        ("epochs", "iterations", "prompts", "group", "minibatch", "update_epochs", "steps"), COUNT
    ),
    "dataset.rounds": COUNT,
    "turns.share": SHARE,
    **dict.fromkeys(
        ("demonstrations", "validate_every", "log_every", "autoencoder.images", "questions"), COUNT
    ),
    "autoencoder.images": Number(2, LARGEST, whole=True, example="300"),
    "save_every": MAYBE_COUNT,
    "stage.chain": Listed(component("stage"), distinct=True, purpose="run"),
    "stage.rounds": COUNT,
    **dict.fromkeys(("lr", "lr_actor", "lr_critic", "lr_vision", "lr_language"), POSITIVE),
    **dict.fromkeys(
        ("weight_decay", "lr_lagrange", "lagrange_gain", "value_coef", "entropy_coef"), NOT_NEGATIVE
    ),
    **dict.fromkeys(
        ("kl_stop", "noise", "look_weight", "cls_look_weight", "next_weight"), NOT_NEGATIVE
    ),
    **dict.fromkeys(
        ("ppo.clip", "turns.clip", "lfd.clip", "grad_clip"), Number(0, above=True, example="1.0")
    ),
    **dict.fromkeys(("gamma", "lam", "full_share", "object_share"), SHARE),
    **dict.fromkeys(("discount", "keep_low"), Number(0, 1, above=True, example="0.5")),
    "threshold_ratio": RATIO,
    "calibrate": Listed(RATIO, least=0, null=True),
    "progressive": Listed(RATIO, null=True, purpose="keep step by step"),
    "temperature": PAIR,
    "served.keep_ratios": Listed(RATIO, purpose="score"),
    "adapt.served.keep_ratios": Listed(RATIO, least=0),  # nothing is served
    "adapt.keep_ratios": RATIOS,
    "adapt.budgets": Listed(RATIO, least=2, distinct=True, purpose="choose"),
    "ppo.budget": OneOf(("free", "lagrange", "exact_k")),
    "ppo.advantage": OneOf(("gae", "grpo", "rloo")),
    "ppo.ratio": OneOf(("token", "joint")),
    "ppo.law": OneOf(("sequential", "kdpp")),
    "lfd.loss": OneOf(("set", "token"), null=True),
    "credit_blocks": Number(0, LARGEST, whole=True, example="4", null="4 where it applies"),
    "served.first": FROM_ZERO,
    **dict.fromkeys(
        ("vision_steps", "language_steps", "caption_steps", "caption_every", "workers"), FROM_ZERO
    ),
    **dict.fromkeys(("vision_batch", "language_batch"), COUNT),
    **dict.fromkeys(("patch", "ffn", "vision_layers", "vision_width", "clip_width"), COUNT),
    # policies
    **dict.fromkeys(("width", "hidden", "layers", "heads", "max_steps"), COUNT),
    "code_width": FROM_ZERO,
    "select": OneOf(("topk", "gumbel", "dpp", "threshold")),
    "kernel": OneOf(("codes", "tokens")),
    "query": OneOf(("tokens", "pooled", "none")),
    "quality": POSITIVE,
    "tau": Number(0, 1, below=True, null="none", example="0.5"),
    "trained_to": RATIO,
    "fade": NOT_NEGATIVE,
    "policy.budgets": Listed(RATIO, least=0),
    "policy.prices": anything,
    # models
    "max_new_tokens": Number(
        1, LARGEST, whole=True, null="what answers of the dataset need", example="16"
    ),
    "micro_batch": Number(1, LARGEST, whole=True, example="16"),
    "model.working_gib": Number(0.001, 2**20, example="2"),
    "model.workers": Number(0, 256, whole=True, null="4 on a GPU, 0 on a CPU", example="4"),
    "model.max_pixels": Number(
        1, LARGEST, whole=True, null="the processor's own", example="1003520"
    ),
    "max_tiles": Number(1, LARGEST, whole=True, null="the processor's own", example="4"),
    "model.prompt": template,
    "model.sharpness": POSITIVE,
    "model.dtype": OneOf(("float32", "bfloat16", "float16", "float64")),
    "model.placement": OneOf(("replicate", "shard")),
    "model.attention": OneOf(("sdpa", "flash_attention_2", "eager"), null=True),
    "model.load_in": OneOf(("8bit", "4bit"), null=True),
    **dict.fromkeys(
        ("geometry.*.num_*", "geometry.*_size", "geometry.*depth", "geometry.*head_dim"), COUNT
    ),
    "geometry.*": anything,
    # pruners, rewards, data
    "pruner.alpha": NOT_NEGATIVE,
    "pruner.share": SHARE,
    "pruner.weights": anything,
    "pruner.weights.*": NOT_NEGATIVE,
    "important": SHARE,
    **dict.fromkeys(("chunks", "drop", "image_pivots", "text_pivots"), COUNT),
    "pruner.r": FROM_ZERO,
    "pruner.scale": POSITIVE,
    "theta": Number(0, 0.99, null="none", example="0.5"),
    **dict.fromkeys(("weight", "agreement", "floor"), FINITE),
    "ceiling": POSITIVE,
    "max_bad_rows": SHARE,
    "max_pixels": Number(1, whole=True, example="16777216"),
    # loggers, trainers
    **dict.fromkeys(("overlay_every", "overlays"), FROM_ZERO),
    **dict.fromkeys(("init_timeout", "finish_timeout"), Number(0, above=True, example="20")),
    "logger.name": anything,
    "logger.mode": OneOf(("online", "offline", "disabled", "shared")),
    **dict.fromkeys(("num_nodes", "accumulate_grad_batches"), COUNT),
    "trainer.devices": devices,
    "gradient_clip_val": Number(0, null="none", example="1.0"),
}
FIXED = {  # options that no class names
    "served": {"keep_ratios", "limit", "first"},
    "evaluation": {"pruners", "datasets", "keep_ratios", "limit", "batch_size", "seeds"},
    "calibrate": {"split", "limit", "keep_ratios", "labels"},
    "turns": {"lengths", "equal"},
    "latency": {"batch_sizes", "repeats", "warmup", "text_tokens", "new_tokens", "image"},
}
OPTIONS = ("cache",)  # what stages are built from that is no group of yamls
SET_BY = {  # arguments of a class that are no options: something else decides them
    "stage.seed": "seed",
    **{
        f"stage.{name}": f"{'' if group in OPTIONS else 'the group '}{group}"
        for name, group in BUILT_FROM.items()
    },
    **dict.fromkeys(("stage.lvlm", "stage.parts"), "the command"),
    **dict.fromkeys(("policy.token_width", "scorer.lvlm"), "the model"),
    "dataset.split": "the stage in training, and by split in an evaluation",
    "trainer.max_epochs": "the stage, e.g. stage.epochs",
    "trainer.max_steps": "the stage, e.g. stage.iterations",
    "trainer.logger": "logger",
    "trainer.gradient_clip_val": "the stage, e.g. stage.clip",
    **dict.fromkeys(
        ("trainer.callbacks", "trainer.enable_progress_bar", "trainer.log_every_n_steps"),
        "the stage",
    ),
    **dict.fromkeys(("trainer.default_root_dir", "logger.save_dir"), "hydra.run.dir"),
    # A stage has a trainer of its own on the ranks and devices of the run, which are there before
    # it.
    **{
        f"stage.trainer.{name}": f"trainer.{name}"
        for name in ("accelerator", "devices", "num_nodes", "strategy")
    },
}
