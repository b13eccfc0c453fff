"""Options that a command accepts and would not read: refused, so that no option is typed in vain.

What every command, mode and stage reads stands in tables here; `tests/commands/test_unread.py`
holds them against the configs. What no command reads, since something else sets it, stands in
`option_kinds.SET_BY`; what a chain of stages decides, in `plan`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from tprl.build import plain, target_at
from tprl.commands.stages import class_of, groups_of, in_full, stages_of
from tprl.errors import UserError
from tprl.runtime.quoting import in_short

# Of `conf/eval.yaml`, beside mode, resume, experiment and logger, which every mode takes.
ENTRIES = frozenset({"run", "sweep", "runs", "pruner", "pruners", "keep_ratios", "seeds"})
EVAL_READS: Mapping[str, frozenset[str]] = {
    "accuracy": ENTRIES
    | {"model", "dataset", "split", "limit", "batch_size", "threads"}
    | {"retention", "confidence", "calibration"},
    "calibrate": ENTRIES - {"keep_ratios", "seeds"}
    | {"model", "dataset", "batch_size", "threads", "calibrate"},
    "turns": ENTRIES | {"model", "dataset", "split", "limit", "batch_size", "threads", "turns"},
    "latency": ENTRIES | {"model", "latency", "threads"},
    "parity": frozenset({"model", "models", "dataset", "split", "limit", "threads"}),
    "selectors": frozenset({"threads"}),
    "compare": frozenset({"compare"}),  # compare=[...] and study=... are modes of their own
    "study": frozenset({"study"}),
}
OWN_MODES = ("compare", "study")
EVAL_ALWAYS = frozenset({"mode", "resume", "experiment", "logger"})
# Of `conf/train.yaml`: beside these, what the stages that run read (`stages.groups_of`).
TRAIN_ALWAYS = frozenset(
    {"stage", "seed", "resume", "experiment", "debug", "logger", "trainer", "model"}
    | {"threads", "deterministic"}
)


class Rule(NamedTuple):
    """An option that is not read while `unread` holds of the config; `why` goes on after "is not
    read: "."""

    key: str
    unread: Callable[[DictConfig], bool]
    why: str


def _drawn(config: DictConfig) -> bool:
    """Whether only the training split of the dataset follows its seed."""
    target = str(OmegaConf.select(config, "dataset._target_"))
    return (
        target in ("tprl.data.scenes.Scenes", "tprl.data.toy.ToyDataset")
        and config.get("split") != "train"
    )


ONLY_TRAINING = "it draws training questions alone, and another split is asked"
WITHOUT_RETENTION = tuple(
    Rule(name, lambda config: config.retention is None, "it belongs to retention, not given")
    for name in ("confidence", "calibration")
)
DEMO_RULES = (
    Rule("keep_ratio", lambda config: config.retention is not None, "retention chooses it"),
    *WITHOUT_RETENTION,
)
EVAL_RULES = (
    Rule("dataset.seed", _drawn, ONLY_TRAINING),
    Rule("pruner.seed", lambda config: True, "seeds=[<seed>] sets it"),
    Rule(
        "keep_ratios",
        lambda config: config.mode == "accuracy" and config.retention is not None,
        "retention chooses how many tokens live",
    ),
    *WITHOUT_RETENTION,
    Rule(
        "model",
        lambda config: config.mode == "parity" and bool(config.models),
        "models names other ones",
    ),
)
EXPORT_RULES = (
    Rule(
        "weights", lambda config: config.target == "vllm", "target=vllm writes them in model.dtype"
    ),
)
RULES = {"demo": DEMO_RULES, "eval": EVAL_RULES, "export": EXPORT_RULES}


def _of_stages(config: DictConfig) -> list[Rule]:
    """What the classes of the stages say of their options, and stages of the chain that this policy
    has no use for."""
    # Rules of stages depend on the composed values, since one option can make another ineffective.
    values = plain(config)
    rules = []
    policy = values.get("policy") or {}
    for key, settings in stages_of(values).items():
        kind = class_of(settings)
        # A condition may read the policy, e.g. whether a DPP serves.
        together = {**settings, "policy": policy}
        # An entry without an option is about the whole stage, which only a chain can leave out.
        unread = [
            entry
            for entry in kind.unread
            if entry.when(together) and (entry.option or key != "stage")
        ]
        rules += [
            Rule(f"{key}.{entry.option}".rstrip("."), lambda _: True, entry.why) for entry in unread
        ]
        # Options of a stage that this chain skips would be typed in vain.
        maker = policy.get("_target_")
        if "chain" in values["stage"] and maker and not kind.applies_to(target_at(maker)):
            why = f"stage={settings['name']} needs another policy and is left out"
            rules.append(Rule(key, lambda _: True, why))
    return rules


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
            raise UserError(f"{in_short(key)} is not read: {reason}; leave it out.")


def _unread(command: str, config: DictConfig, key: str) -> str | None:
    """Why an option changes nothing; None where it is read."""
    key = f"model.{key}" if key == "geometry" else in_short(key)  # where the group's yamls go
    # Hydra's own keys and the name of the config itself are read by Hydra.
    top = key.replace("/", ".").partition(".")[0]
    if top in ("hydra", "", command):
        return None
    # Whole groups by the tables above, single options by the rules.
    reason = _of_command(command, config, top)
    rules = _of_stages(config) if command == "train" else RULES.get(command, ())
    matching = (
        rule.why
        for rule in rules
        if _below(key, rule.key) and _value(config, key) and rule.unread(config)
    )
    return reason or next(matching, None)


def _of_command(command: str, config: DictConfig, top: str) -> str | None:
    if command == "eval":
        # compare and study are typed without mode=, and then take the place of accuracy.
        asked = (name for name in OWN_MODES if config.mode == "accuracy" and config.get(name))
        mode = next(asked, str(config.mode))
        return _outside(top, f"mode={mode}", EVAL_READS.get(mode), EVAL_ALWAYS, config)
    if command == "train":
        return _outside(
            top, f"stage={config.stage.get('name')}", _groups(config), TRAIN_ALWAYS, config
        )
    return None


def _groups(config: DictConfig) -> frozenset[str]:
    """The groups that the stages of this run read."""
    parts = stages_of({"stage": plain(config.stage, resolve=False)})
    chained = "chain" in config.stage
    return frozenset().union(*(groups_of(class_of(part), chained) for part in parts.values()))


def _outside(
    top: str, what: str, reads: Collection[str] | None, always: Collection[str], config: DictConfig
) -> str | None:
    """Why a key or group is none of those that `what` reads; an option that is null or empty asks
    for nothing."""
    # Unknown keys are not judged here: another check calls them no option.
    if (
        reads is None
        or top in reads
        or top in always
        or top not in config
        or not _value(config, top)
    ):
        return None
    what = what.removeprefix("mode=") if what.removeprefix("mode=") in OWN_MODES else what
    return f"{what} reads {', '.join(sorted(reads)) or 'no data and no model'}"


def _below(key: str, rule: str) -> bool:
    return key == rule or key.startswith(f"{rule}.")


def _value(config: DictConfig, key: str) -> bool:
    """Whether the option asks for something: neither null nor an empty list."""
    value = OmegaConf.select(config, in_full(key))
    return value is not None and not (OmegaConf.is_config(value) and not value)
