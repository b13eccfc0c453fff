"""Options that would change nothing are refused: which they are, for every mode and stage."""

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from tests.commands.calls import refused
from tests.configs import composed

from tprl.build import choices
from tprl.commands.stages import in_full
from tprl.commands.unread import EVAL_ALWAYS, EVAL_READS, TRAIN_ALWAYS, check_read
from tprl.errors import UserError

GROUPS = ("stage", "experiment", "policy", "model", "dataset", "pruner", "reward", "logger")
# The options of eval.yaml and of train.yaml that some mode or stage leaves alone.
EVALUATION = {
    *(
        "model",
        "dataset",
        "pruner",
        "geometry",
        "models",
        "run",
        "sweep",
        "runs",
        "pruners",
        "keep_ratios",
        "split",
    ),
    *("limit", "batch_size", "seeds", "latency", "threads"),
    *("retention", "calibrate", "turns"),
}
# read with a retention alone
OF_RETENTION = {"confidence", "calibration"}
ABSENT = {"pruner", "geometry"}  # null in eval.yaml, so that the config has no such keys
TRAINING = {"dataset", "policy", "pruner", "reward", "cache"}
# The options that each mode and stage accepts and would not read.
UNREAD_BY_MODE = {
    "accuracy": {"models", "latency", "calibrate", "turns"},
    "turns": {"models", "latency", "calibrate", "retention"},
    "calibrate": {"models", "latency", "keep_ratios", "seeds", "split", "limit", "retention"}
    | {"turns"},
    "latency": {"dataset", "split", "limit", "batch_size", "models", "retention", "calibrate"}
    | {"turns"},
    "parity": {
        "pruner",
        "run",
        "sweep",
        "runs",
        "pruners",
        "keep_ratios",
        "batch_size",
        "seeds",
        "latency",
        "retention",
        "calibrate",
        "turns",
    },
    "selectors": EVALUATION - {"threads"},
    "compare": EVALUATION,
    "study": EVALUATION,
}
UNREAD_BY_STAGE = {
    "all": set[str](),
    "alternate": {"pruner"},
    "autoencoder": {"pruner", "reward", "cache"},
    "lfd": {"reward"},
    "ppo": {"pruner"},
    "distill": {"pruner", "reward", "cache"},
    "adapt": {"pruner", "reward", "cache"},
    "tune": {"policy", "reward", "cache"},
    "turns": {"pruner"},
    "pretrain": {"dataset", "policy", "pruner", "reward", "cache"},
}
EVAL_MODE = {mode: f"mode={mode}" for mode in EVAL_READS} | {
    "compare": "compare=[a,b]",
    "study": "study=folder",
}


def read_from(command: str, *words: str) -> DictConfig:
    """What a command line composes; only its groups go through Hydra, which takes its time."""
    groups = tuple(word for word in words if word.partition("=")[0] in GROUPS)
    config = copy.deepcopy(composed(command, *groups))
    OmegaConf.set_struct(config, False)
    values = OmegaConf.from_dotlist(
        [in_full(word.lstrip("+")) for word in words if word not in groups]
    )
    merged = OmegaConf.merge(config, values)
    assert isinstance(merged, DictConfig)
    return merged


def keys(*words: str) -> list[str]:
    return [word.partition("=")[0].lstrip("+") for word in words]


def sentence(command: str, *words: str) -> str | None:
    return said_of(command, read_from(command, *words), keys(*words))


def said_of(command: str, config: DictConfig, typed: list[str]) -> str | None:
    try:
        check_read(command, config, typed)
    except UserError as error:
        return str(error)
    return None


def unread(command: str, word: str, options: Iterable[str]) -> set[str]:
    """Those of the options that are refused when they ask for something."""
    refusals = set()
    for key in options:
        config = read_from(command, word)
        place = "model.geometry" if key == "geometry" else key
        OmegaConf.update(config, place, {"asks": 1}, merge=False, force_add=True)
        if said_of(command, config, [key]):
            refusals.add(key)
    return refusals


@pytest.mark.parametrize("mode", EVAL_READS)
def test_every_option_of_an_evaluation_is_read_or_refused(mode: str) -> None:
    assert set(composed("eval")) - EVAL_ALWAYS == (
        (EVALUATION - ABSENT) | {"compare", "study"} | OF_RETENTION
    )
    assert unread("eval", EVAL_MODE[mode], EVALUATION) == UNREAD_BY_MODE[mode]


@pytest.mark.parametrize("stage", choices("stage"))
def test_every_option_of_training_is_read_or_refused(stage: str) -> None:
    assert set(composed("train")) - TRAIN_ALWAYS == TRAINING
    assert unread("train", f"stage={stage}", TRAINING) == UNREAD_BY_STAGE[stage]


def test_every_stage_and_mode_has_its_table() -> None:
    assert set(UNREAD_BY_STAGE) == set(choices("stage"))


@pytest.mark.parametrize(
    ("command", "words", "reason"),
    [
        (
            "eval",
            ["mode=parity", "models=[llava]", "model.dtype=float32"],
            "model.dtype is not read: models names",
        ),
        ("eval", ["dataset.seed=3"], "dataset.seed is not read: it draws training questions alone"),
        ("eval", ["dataset.seed=3", "split=train"], None),
        (
            "eval",
            ["retention=0.98", "keep_ratios=[0.5]"],
            "keep_ratios is not read: retention chooses how many tokens live",
        ),
        ("eval", ["confidence=0.8"], "confidence is not read: it belongs to retention, not given"),
        ("eval", ["retention=0.98", "confidence=0.8", "calibration=there"], None),
        ("demo", ["retention=0.98", "keep_ratio=0.2"], "keep_ratio is not read: retention chooses"),
        (
            "eval",
            ["pruner=random", "++pruner.seed=1"],
            "pruner.seed is not read: seeds=[<seed>] sets it; leave it out.",
        ),
        ("eval", ["compare=[a,b]", "limit=3"], "limit is not read: compare reads compare"),
        ("eval", ["compare=null", "limit=3"], None),
        ("eval", ["models=[]", "run=null"], None),  # nothing is asked for
        ("eval", ["mode=selectors", "logger=none"], None),
        (
            "train",
            ["stage=ppo", "stage.threshold_ratio=0.3"],
            "stage.threshold_ratio is not read: budget=exact_k",
        ),
        ("train", ["stage=ppo", "stage.threshold_ratio=0.3", "stage.budget=free"], None),
        ("train", ["stage.ppo.threshold_ratio=0.3"], "stage.ppo.threshold_ratio is not read"),
        (
            "train",
            ["stage=ppo", "stage.lr_critic=0.1"],
            "stage.lr_critic is not read: only advantage=gae",
        ),
        ("train", ["stage=ppo", "stage.lr_critic=0.1", "stage.advantage=gae"], None),
        *(
            (
                "train",
                ["stage=ppo", f"stage.{name}=0.5"],
                f"stage.{name} is not read: only advantage=gae has a critic",
            )
            for name in ("gamma", "lam", "value_coef")
        ),
        ("train", ["stage=ppo", "stage.gamma=0.5", "stage.advantage=gae"], None),
        (
            "train",
            ["stage=ppo", "stage.lagrange_gain=3"],
            "stage.lagrange_gain is not read: only budget=lagrange has",
        ),
        ("train", ["stage=ppo", "stage.lr_lagrange=3", "stage.budget=lagrange"], None),
        (
            "train",
            ["stage=ppo", "stage.discount=0.9"],
            "stage.discount is not read: budget=exact_k draws sets",
        ),
        ("train", ["stage=ppo", "stage.discount=0.9", "stage.budget=lagrange"], None),
        ("train", ["stage=ppo", "stage.law=kdpp"], None),
        (
            "train",
            ["stage=ppo", "stage.law=kdpp", "stage.budget=free"],
            "stage.law is not read: only budget=exact_k",
        ),
        (
            "train",
            ["stage=ppo", "stage.law=kdpp", "policy.select=topk"],
            "stage.law is not read: only sets that policy",
        ),
        (
            "train",
            ["stage=ppo", "stage.calibrate=[0.5]", "stage.budget=free"],
            "stage.calibrate is not read: budget=f",
        ),
        (
            "train",
            ["stage=lfd", "stage.calibrate=[0.5]", "policy.select=topk"],
            "stage.calibrate is not read: only what",
        ),
        ("train", ["stage=lfd", "stage.calibrate=[0.5]"], None),
        (
            "train",
            ["policy.code_width=0", "stage.autoencoder.images=50"],
            (
                "stage.autoencoder.images is not read: "
                "policy.code_width=0 has no autoencoder; leave it out."
            ),
        ),
        ("train", ["policy.code_width=0", "stage=autoencoder"], None),
        (
            "train",
            ["stage=lfd", "stage.steps=2", "stage.progressive=[0.5]"],
            "stage.steps is not read: progressive",
        ),
        ("train", ["stage=lfd", "stage.steps=2"], None),
        ("train", ["stage=ppo", "stage.init_from=runs/a"], None),
        (
            "train",
            ["policy=mlp", "stage.adapt.questions=9"],
            "stage.adapt.questions is not read: stage=adapt needs",
        ),
        ("train", ["stage.adapt.questions=9"], None),
        (
            "train",
            ["stage=adapt", "stage.served.keep_ratios=[0.5]"],
            "stage.served.keep_ratios is not read: prices",
        ),
        ("train", ["experiment=paper", "seed=3"], None),
        ("demo", ["split=val", "pruners=uniform"], None),
    ],
)
def test_options_disabled_by_other_options_are_refused(
    command: str, words: list[str], reason: str | None
) -> None:
    refusal = sentence(command, *words)
    assert refusal is None if reason is None else refusal is not None and refusal.startswith(reason)


def test_the_command_line_names_unread_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(
        capsys, "eval", tmp_path / "run", "limit=8", "pruners=[uniform]", "models=[llava]"
    )
    assert line.startswith(
        "error: models is not read: mode=accuracy reads batch_size, calibration, confidence,"
    )
    assert line.endswith("; leave it out.")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_option_is_named_as_it_is_typed() -> None:
    sentence = said_of(
        "train", read_from("train", "stage=ppo", "stage.gamma=0.5"), ["stage.module.gamma"]
    )
    assert sentence == "stage.gamma is not read: only advantage=gae has a critic; leave it out."


def test_groups_are_typed_as_groups() -> None:
    config = OmegaConf.create({"mode": "selectors", "model": {"name": "a"}})
    with pytest.raises(UserError, match="model is not read: mode=selectors reads threads"):
        check_read("eval", config, ["model"])
    check_read("eval", config, ["hydra/launcher", "hydra.run.dir"])
