"""Every option of train, eval, demo and export is checked against the table of `option_kinds`, and
against the annotations of the class that its yaml builds, before anything is loaded or computed."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tprl.build import arguments_of, check_arguments, choices, conf_dir, plain
from tprl.commands.annotated import annotations_of, kind_of
from tprl.commands.option_kinds import FIXED, KINDS, SET_BY
from tprl.commands.stages import RUNNER, class_of, in_full, stages_of
from tprl.errors import UserError
from tprl.kinds import (
    Kind,
    anything,
    typed,
)

CLIPS = ("grad_clip", "clip")  # options of stages that say what Lightning calls gradient_clip_val


def checked(config: DictConfig, entry: str) -> DictConfig:
    """The config, with single values put into lists where lists are meant.

    Args:
        config: composed, of `entry`.
        entry: "train", "eval", "demo" or "export".

    Raises:
        UserError: an option cannot hold its value, or is none.
    """
    # Strangers first: an unknown name must not be reported as a wrong value.
    values = plain(config)
    _refuse_strangers(values, entry)
    # Then names of arguments, for stages and groups, against the constructors.
    for name, node in stages_of(values).items():
        check_arguments({key: value for key, value in node.items() if key not in RUNNER}, name)
        _check_complete(name, node)
        _check_trainer(name, node, values)
    for group, node in values.items():
        if group != "stage" and isinstance(node, Mapping):
            check_arguments(node, str(group))
    # Then values. A changed type counts as a change, since 1 and True and 1.0 are equal.
    for key, place, value, annotation in _options(values, entry):
        if (decides := _set_by(key)) is not None:
            raise UserError(
                f"{key}={typed(value)} would change nothing: it is set by {decides}. Leave it out."
            )
        checked_value = _kind(key, place, annotation)(key, value)
        if checked_value != value or type(checked_value) is not type(value):
            OmegaConf.update(config, in_full(key), checked_value, merge=False, force_add=True)
    return config


def _check_complete(key: str, stage: Mapping[str, Any]) -> None:
    """Refuse a stage without a value for one of its hyper-parameters; `seed` is the command's.

    The settings of a run of an earlier version know nothing of options that have come since.
    """
    # What is built for a stage has no kind of option, so it cannot be missing from a yaml.
    kind = class_of(stage)
    hints = annotations_of(stage["_target_"])
    for name, parameter in arguments_of(kind).items():
        is_option = kind_of(hints.get(name, Any)) is not anything and name != "seed"
        if is_option and parameter.default is parameter.empty and name not in stage:
            raise UserError(
                f"{key}.{name} is missing, and {kind.__name__} has no default for "
                f"it: give {key}.{name}=<value>{_packaged(stage['name'], name)}."
            )


def _packaged(stage: str, option: str) -> str:
    """What the yaml of a stage that ships with TPRL says of an option, for a sentence about where
    it is missing."""
    if stage not in choices("stage"):
        return ""
    packaged = plain(OmegaConf.load(conf_dir() / "stage" / f"{stage}.yaml"), resolve=False)
    module = packaged.get("module") or {}
    return f"; conf/stage/{stage}.yaml has {typed(module[option])}" if option in module else ""


def _check_trainer(key: str, stage: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse arguments in a stage's `trainer` that Lightning's Trainer does not have, or that the
    stage has itself."""
    options = stage.get("trainer") or {}
    check_arguments({**options, "_target_": plain["trainer"]["_target_"]}, f"{key}.trainer")
    # The stage clips by an option of its class; two norms would contradict each other.
    clip = next((name for name in CLIPS if name in stage), None)
    if clip and options.get("gradient_clip_val") is not None:
        raise UserError(
            f"{key}.trainer.gradient_clip_val={typed(options['gradient_clip_val'])} contradicts "
            f"{key}.{clip}={typed(stage[clip])}: leave it out, and set {key}.{clip}."
        )


def _set_by(key: str) -> str | None:
    """What decides an option that is none, if something does; of a stage of a chain as of the stage
    alone."""
    # From stage.ppo.trainer.x to stage.trainer.x and trainer.x: tables name an option once.
    above, _, last = key.rpartition(".")
    if above.partition(".")[0] != "stage":
        return SET_BY.get(key)
    if not above.endswith(".trainer"):
        return SET_BY.get(f"stage.{last}")
    if last == "gradient_clip_val":  # here it is an option: see `_check_trainer`
        return None
    return SET_BY.get(f"stage.trainer.{last}", SET_BY.get(f"trainer.{last}"))


def _refuse_strangers(values: Mapping[str, Any], entry: str) -> None:
    """Refuse options that +name=... adds where nothing reads them."""
    # What the packaged yaml and its groups name is known; tables of fixed options follow below.
    packaged = plain(OmegaConf.load(conf_dir() / f"{entry}.yaml"), resolve=False)
    groups = set[str]()
    for line in packaged["defaults"]:
        if isinstance(line, Mapping):
            groups |= line.keys()
    nodes = {"": (values, groups | packaged.keys())}
    stages = (*stages_of(values).items(), ("stage", values.get("stage") or {}))
    for name, node in (("", values), *stages):
        # `served`, `calibrate` and the like belong to no class, so their options are listed in
        # FIXED.
        inside = {
            key: child for key, child in node.items() if key in FIXED and isinstance(child, Mapping)
        }
        nodes |= {
            f"{name}.{key}.".lstrip("."): (child, FIXED[key]) for key, child in inside.items()
        }
    for prefix, (node, known) in nodes.items():
        for name in node:
            if name not in known:
                listed = ", ".join(sorted(known - groups - {"defaults", "hydra"}))
                raise UserError(
                    f"{prefix}{name} is not an option: nothing reads it. Choose from: {listed}."
                )


def _options(plain: Mapping[str, Any], entry: str) -> Iterator[tuple[str, str, Any, Any]]:
    """(option, its full name, value, annotation of the argument or None) of every option."""
    for key, value in plain.items():
        if key == "stage":
            yield from _stage_options(plain)
        elif value != {} or key in KINDS:  # an empty one is a group without a choice
            place = f"{entry}.{key}" if f"{entry}.{key}" in KINDS else key
            yield from _below(key, place, value, None)


def _stage_options(plain: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Those of every stage that runs, by its name, and those of the chain around them."""
    stages = stages_of(plain)
    for key, settings in stages.items():
        yield from _below(key, settings["name"], settings, None)
    # In a chain, options beside the stages themselves are checked too.
    if "stage" not in stages:
        around = {
            key: value for key, value in plain["stage"].items() if f"stage.{key}" not in stages
        }
        for key, value in around.items():
            yield from _below(f"stage.{key}", f"stage.{key}", value, None)


def _below(
    key: str, place: str, value: Any, annotation: Any
) -> Iterator[tuple[str, str, Any, Any]]:
    """An option, or those below it. Lists of numbers are one option, lists of components are
    several."""
    # A built component knows the annotations of its arguments; a fixed table has none.
    last = place.rpartition(".")[2]
    if isinstance(value, Mapping) and (
        "_target_" in value or (value and last in {*FIXED, "trainer"})
    ):
        hints = annotations_of(value["_target_"]) if "_target_" in value else {}
        for name, child in value.items():
            if not str(name).startswith("_"):
                yield from _below(f"{key}.{name}", f"{place}.{name}", child, hints.get(str(name)))
    # Tables of components have names that nothing annotates: each entry is checked by itself.
    elif isinstance(value, Mapping) and ("geometry" in place or _are_components(value)):
        for name, child in value.items():
            yield from _below(f"{key}.{name}", f"{place}.{name}", child, None)
    elif isinstance(value, list) and any(
        isinstance(item, Mapping) and "_target_" in item for item in value
    ):
        for number, child in enumerate(value):
            yield from _below(f"{key}[{number}]", f"{place}[{number}]", child, None)
    else:
        yield key, place, value, annotation


def _are_components(table: Mapping[Any, Any]) -> bool:
    """Whether what stands in a table is built, such as the terms of a reward."""
    return any(isinstance(child, Mapping) and "_target_" in child for child in table.values())


def _kind(key: str, place: str, annotation: Any) -> Kind:
    """What an option may hold: by the longest end of its full name, else by its annotation."""
    parts = place.split(".")
    # From the full name to its last word: the most specific entry of the table wins.
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if end in KINDS:
            return KINDS[end]
        pattern = next((name for name in KINDS if "*" in name and fnmatch(end, name)), None)
        if pattern is not None:
            return KINDS[pattern]
    if annotation is not None:
        return kind_of(annotation)
    if place.startswith(("logger.", "trainer.")) or ".trainer." in place:
        return anything  # their own classes check what is handed on to them
    raise UserError(f"{key} is not an option: nothing reads it. Leave it out.")
