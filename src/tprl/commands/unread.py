"""Options that a command accepts and would not read: refused, so that no option is typed in vain.

What every command, mode and stage reads stands in tables here; `tests/commands/test_unread.py` holds them against the
configs. What no command reads, since something else sets it, stands in `options.SET_BY`; what a chain of stages
decides, in `plan`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from tprl.errors import UserError

# Of `conf/eval.yaml`, beside mode, resume, experiment and logger, which every mode takes.
ENTRIES = frozenset({"run", "sweep", "runs", "pruner", "pruners", "keep_ratios", "seeds"})
EVAL_READS: Mapping[str, frozenset[str]] = {
    "accuracy": ENTRIES | {"model", "dataset", "split", "limit", "batch_size", "threads"},
    "latency": ENTRIES | {"model", "latency", "threads"},
    "parity": frozenset({"model", "models", "dataset", "split", "limit", "threads"}),
    "selectors": frozenset({"threads"}),
    "compare": frozenset({"compare"}),  # compare=[...] and study=... are modes of their own
    "study": frozenset({"study"}),
}
OWN_MODES = ("compare", "study")
EVAL_ALWAYS = frozenset({"mode", "resume", "experiment", "logger"})
# Of `conf/train.yaml`, beside stage, seed, resume, experiment, debug, threads, logger, trainer and model.
TRAIN_READS: Mapping[str, frozenset[str]] = {
    "all": frozenset({"dataset", "policy", "pruner", "reward", "cache"}),
    "autoencoder": frozenset({"dataset", "policy"}),
    "lfd": frozenset({"dataset", "policy", "pruner", "cache"}),
    "ppo": frozenset({"dataset", "policy", "reward", "cache"}),
    "distill": frozenset({"dataset", "policy"}),
    "adapt": frozenset({"dataset", "policy"}),  # policy has a sentence of its own
    "pretrain": frozenset(),
}
TRAIN_ALWAYS = frozenset({"stage", "seed", "resume", "experiment", "debug", "threads", "logger", "trainer", "model"})


class Rule(NamedTuple):
    """An option that is not read while `unread` holds of the config; `why` goes on after "is not read: "."""

    key: str
    unread: Callable[[DictConfig], bool]
    why: str


def _is(key: str, *values: Any) -> Callable[[DictConfig], bool]:
    return lambda config: OmegaConf.select(config, key) in values


def _set(key: str) -> Callable[[DictConfig], bool]:
    return lambda config: bool(OmegaConf.select(config, key))


def _drawn(config: DictConfig) -> bool:
    """Whether only the training split of the dataset follows its seed."""
    target = str(OmegaConf.select(config, "dataset._target_"))
    return target in ("tprl.data.scenes.Scenes", "tprl.data.toy.ToyDataset") and config.get("split") != "train"


def _of_stage(*names: str) -> list[Rule]:
    """Rules of stages, alone and as a part of stage=all."""
    rules = []
    for prefix in ("stage", *(f"stage.{name}" for name in names)):
        if "lfd" in names:
            progressive = _set(f"{prefix}.progressive")
            why = "progressive gives the number of steps and the kept share of each"
            rules += [Rule(f"{prefix}.{key}", progressive, why) for key in ("steps", "keep_ratio")]
        if "ppo" in names:
            exact, critic = _is(f"{prefix}.budget", "exact_k"), _is(f"{prefix}.advantage", "grpo", "rloo")
            rules.append(Rule(f"{prefix}.threshold_ratio", exact, "budget=exact_k serves no threshold"))
            rules.append(Rule(f"{prefix}.lr_critic", critic, "only advantage=gae has a critic"))
    return rules


ONLY_TRAINING = "it draws training questions alone, and another split is asked"
NO_BUDGETS = "stage=adapt needs policy=transformer and is left out"
EVAL_RULES = (
    Rule("dataset.seed", _drawn, ONLY_TRAINING),
    Rule("pruner.seed", lambda config: True, "seeds=[<seed>] sets it"),
    Rule("model", lambda config: config.mode == "parity" and bool(config.models), "models names other ones"),
)
EXPORT_RULES = (Rule("weights", _is("target", "vllm"), "target=vllm writes them in model.dtype"),)
TRAIN_RULES = (
    *_of_stage("lfd"),
    *_of_stage("ppo"),
    Rule(
        "stage.adapt",
        lambda config: config.stage.name == "all" and "tprl.TPRL" not in str(config.policy.get("_target_")),
        NO_BUDGETS,
    ),
    Rule(
        "stage.served.keep_ratios",
        _is("stage.name", "adapt"),
        "prices are found on validation questions, and nothing is served",
    ),
    Rule("stage.adapt.served.keep_ratios", lambda config: True, "prices are found, and nothing is served"),
)


def check_read(command: str, config: DictConfig, typed: Iterable[str]) -> None:
    """Refuse options that this command would not read.

    Args:
        command: "train", "eval", "demo" or "export".
        config: what they compose.
        typed: keys and groups of the command line, e.g. "dataset" or "dataset.source".

    Raises:
        UserError: one of them changes nothing.
    """
    for key in typed:
        reason = _unread(command, config, key)
        if reason:
            raise UserError(f"{key} is not read: {reason}; leave it out.")


def _unread(command: str, config: DictConfig, key: str) -> str | None:
    """Why an option changes nothing; None where it is read."""
    key = f"model.{key}" if key == "geometry" else key  # where the group's yamls go
    top = key.replace("/", ".").partition(".")[0]
    if top in ("hydra", "", command):
        return None
    reason = _of_command(command, config, top)
    rules = {"eval": EVAL_RULES, "train": TRAIN_RULES, "export": EXPORT_RULES}.get(command, ())
    matching = (rule.why for rule in rules if _below(key, rule.key) and _value(config, key) and rule.unread(config))
    return reason or next(matching, None)


def _of_command(command: str, config: DictConfig, top: str) -> str | None:
    if command == "eval":
        asked = (name for name in OWN_MODES if config.mode == "accuracy" and config.get(name))
        mode = next(asked, str(config.mode))
        return _outside(top, f"mode={mode}", EVAL_READS.get(mode), EVAL_ALWAYS, config)
    if command == "train":
        stage = str(config.stage.get("name"))
        return _outside(top, f"stage={stage}", TRAIN_READS.get(stage), TRAIN_ALWAYS, config)
    return None


def _outside(
    top: str, what: str, reads: Collection[str] | None, always: Collection[str], config: DictConfig
) -> str | None:
    """Why a key or group is none of those that `what` reads; an option that is null or empty asks for nothing."""
    if reads is None or top in reads or top in always or top not in config or not _value(config, top):
        return None
    what = what.removeprefix("mode=") if what.removeprefix("mode=") in OWN_MODES else what
    return f"{what} reads {', '.join(sorted(reads)) or 'no data and no model'}"


def _below(key: str, rule: str) -> bool:
    return key == rule or key.startswith(f"{rule}.")


def _value(config: DictConfig, key: str) -> bool:
    """Whether the option asks for something: neither null nor an empty list."""
    value = OmegaConf.select(config, key)
    return value is not None and not (OmegaConf.is_config(value) and not value)
