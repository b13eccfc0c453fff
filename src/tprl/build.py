"""From yaml to objects: the only call of `hydra.utils.instantiate`, and only for targets on the
allow-list."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate  # noqa: TID251
from omegaconf import DictConfig, OmegaConf

from tprl.errors import UserError

ALLOWED = ("tprl.", "torch.optim.", "lightning.pytorch.")
# Modules that have moved: settings that earlier runs saved, and folders of theirs, name the old
# ones.
MOVED = {
    "tprl.metrics_csv": "tprl.runtime.metrics_csv",
    "tprl.tracking": "tprl.runtime.tracking",
    "tprl.stages.pretrain": "tprl.pretraining.stage",
    "tprl.lvlm.tiny_llava": "tprl.pretraining.tiny_llava",
}


def conf_dir() -> Path:
    """The config directory, absolute: `tprl/conf` inside a wheel, the repository's `conf`
    otherwise."""
    packaged = Path(__file__).resolve().parent / "conf"
    return packaged if packaged.is_dir() else packaged.parents[2] / "conf"


def choices(group: str) -> list[str]:
    """The names a config group offers, sorted; empty if there is no such group."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def plain(config: Any, resolve: bool = True) -> dict[str, Any]:
    """A config node as containers of plain values, interpolations resolved or as they are."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))


def build(config: DictConfig | Mapping[str, Any], /, **live: Any) -> Any:
    """The object a config node describes.

    Nested nodes with a `_target_` are built too; containers arrive as plain lists and dicts.

    Args:
        config: a node with `_target_`. With `_partial_: true` and no `live`, the result is a
            partial.
        live: arguments that are objects (a model, a path). They never pass through OmegaConf.

    Raises:
        UserError: a target that is not on the allow-list, does not exist, or has no such argument.
    """
    # Plain values are for checking alone: the node keeps its parent, which interpolations need.
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=not live)
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise UserError(
            f"a config must name a class or function, got {plain}: add _target_: tprl.<...>."
        )
    # Before anything is built. A partial, because live objects would not survive OmegaConf.
    _check(plain)
    try:
        component = instantiate(_moved(node), _partial_=True, _convert_="all")
    except InstantiationException as error:
        # Hydra wraps what a nested constructor refused; its own sentence is the one to show.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return component if plain.get("_partial_") and not live else component(**live)


def load_component(group: str, name: str, **live: Any) -> Any:
    """Build `<group>/<name>.yaml` without starting Hydra, for library code and notebooks.

    Raises:
        UserError: the group has no such name.
    """
    if name not in choices(group):
        raise UserError(
            f"{group}={name} does not exist; choose one of: {', '.join(choices(group))}."
        )
    config = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    return build(config, **live)


def target_of(group: str, name: str) -> Any:
    """The class or function that `<group>/<name>.yaml` names, not built."""
    config = OmegaConf.load(conf_dir() / group / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    return _allowed(config["_target_"])


def target_at(target: str) -> Any:
    """The class or function at a dotted path.

    Raises:
        UserError: it is not on the allow-list, or not there.
    """
    return _allowed(target)


def current(target: str) -> str:
    """Where the class or function is today that settings of an earlier version call `target`."""
    module, _, name = target.rpartition(".")
    return f"{MOVED.get(module, module)}.{name}"


def check_arguments(node: Mapping[str, Any], name: str) -> None:
    """Refuse targets that are not allowed and arguments that they do not have, in plain containers
    of config `name`.

    Raises:
        UserError: there is one.
    """
    try:
        _check(node)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _moved(node: DictConfig) -> DictConfig:
    """The config node with today's `_target_`s; itself where it names no old one."""
    raw = OmegaConf.to_container(node, resolve=False)
    today = _today(raw)
    return node if today == raw else DictConfig(today)


def _today(node: Any) -> Any:
    """Plain containers with today's `_target_`s."""
    if isinstance(node, list):
        return [_today(child) for child in node]
    if not isinstance(node, dict):
        return node
    children = {key: _today(child) for key, child in node.items()}
    if isinstance(target := node.get("_target_"), str):
        children["_target_"] = current(target)
    return children


def _check(node: Any) -> None:
    """Walk plain containers and check every `_target_` and its arguments."""
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _check(child)
    if isinstance(node, dict) and "_target_" in node:
        _check_arguments(_allowed(node["_target_"]), node)


def _allowed(target: Any) -> Any:
    """The object behind `target`. Where it was *defined* counts too: `tprl.x.os.system` reaches out
    of tprl."""
    if isinstance(target, str) and target.startswith(ALLOWED):
        try:
            loaded = get_object(current(target))
        except Exception as error:  # a module may raise anything while it is imported
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"_target_ {target} cannot be imported ({reason}).") from error
        home = getattr(loaded, "__module__", None) or ""
        if callable(loaded) and f"{home}.".startswith(ALLOWED):
            return loaded
    raise UserError(
        f"_target_ {target} is not allowed: name a class or function of {', '.join(ALLOWED)}."
    )


def arguments_of(target: Any) -> dict[str, inspect.Parameter]:
    """The arguments that a class or function takes by name, with those of our bases that its
    **options go to."""
    return _arguments(target)[0]


def _arguments(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments, and whether these are all of them."""
    arguments: dict[str, inspect.Parameter] = {}
    # **options of our classes go to their base, so the base's arguments count too; where others' go
    # is not known.
    for maker in target.__mro__ if inspect.isclass(target) else (target,):
        if maker is not target and not maker.__module__.startswith("tprl."):
            return arguments, False
        parameters = inspect.signature(maker).parameters.values()
        # setdefault: a subclass's own parameter hides its base's.
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                arguments.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return arguments, True
    return arguments, False


def _check_arguments(target: Any, node: dict[Any, Any]) -> None:
    names, complete = _arguments(target)
    if not complete:
        return
    # Hydra's own keys stand beside the arguments.
    for key in node:
        if key not in names and key not in (
            "_target_",
            "_partial_",
            "_convert_",
            "_recursive_",
            "_args_",
        ):
            raise UserError(
                f"{node['_target_']} has no argument {key}; it takes: {', '.join(sorted(names))}."
            )
