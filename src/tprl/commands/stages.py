"""The two blocks of a stage's yaml, and how their options are typed.

`module:` holds the hyper-parameters of the stage's class, the rest is the runner's. On the command
line both begin with `stage.` (in stage=all with `stage.ppo.` and the like): `stage.lr_actor=1e-4`
is read as `stage.module.lr_actor=1e-4`.
"""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from tprl.build import arguments_of, choices, target_at
from tprl.errors import UserError
from tprl.runtime.quoting import MODULE

if TYPE_CHECKING:
    from tprl.stages.base import Stage

# What the runner reads; the class does not know it.
RUNNER = (
    "name",
    "init_from",
    "served",
    "calibrate",
    "save_every",
    "log_every",
    "trainer",
    "blueprint",
)
CHAIN = ("chain", "rounds", "baselines", "evaluation")  # what only chains have
# Arguments of a stage's constructor that the runner builds: the group of the command line that each
# comes from.
BUILT_FROM = {
    "pruner": "policy",
    "dataset": "dataset",
    "demonstrator": "pruner",
    "selector": "pruner",
    "reward": "reward",
    "scorer": "scorer",
    "cache": "cache",
}


def in_full(word: str) -> str:
    """An option of a stage as Hydra finds it: `stage.lr=1` as `stage.module.lr=1`; any other word
    as it is."""
    key, equals, value = word.partition("=")
    mark = key[: len(key) - len(key.lstrip("+~"))]
    names = key.removeprefix(mark).split(".")
    start = 2 if len(names) > 2 and names[1] in choices("stage") else 1
    if names[0] != "stage" or len(names) <= start or names[start] in (MODULE, *RUNNER, *CHAIN):
        return word
    if start == 1 and names[1] in choices("stage"):  # a whole stage of the chain
        return word
    return f"{mark}{'.'.join([*names[:start], MODULE, *names[start:]])}{equals}{value}"


def stages_of(plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that a config of train runs, by the names of their options: `stage`, or
    `stage.ppo` and the like. Both blocks of each are one table, with the `_target_` of its class.

    Raises:
        UserError: a stage has no settings, no name or no block `module`, or a hyper-parameter
            stands beside that block.
    """
    stage = plain.get("stage")
    if not stage:
        return {}
    if "chain" not in stage:
        return {"stage": in_one_table("stage", stage)}
    _check_name("stage", stage)
    chain = stage["chain"] or ()
    names = [chain] if isinstance(chain, str) else chain
    return {f"stage.{name}": in_one_table(f"stage.{name}", _part(stage, name)) for name in names}


def _part(chain: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of a stage of the chain."""
    if name not in choices("stage") or name == chain["name"]:
        known = ", ".join(choice for choice in choices("stage") if choice != chain["name"])
        raise UserError(
            f"stage.chain={name} is not a stage to run in a chain; choose one of: {known}."
        )
    if not isinstance(part := chain.get(name), Mapping):
        raise UserError(
            f"stage.chain names {name}, of which stage={chain['name']} has no settings: "
            f"add +stage@stage.{name}={name} before it, or leave {name} out."
        )
    return part


def _check_name(key: str, stage: Mapping[str, Any]) -> None:
    if not stage.get("name"):
        raise UserError(f"{key} has no name: write `name: <its name>` at the top of its yaml.")


def in_one_table(key: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    """Both blocks of a stage's yaml as one table; `key` is how its options are typed.

    Raises:
        UserError: it has no name or no block `module`, or a hyper-parameter stands beside that
            block.
    """
    _check_name(key, stage)
    if not isinstance(stage.get(MODULE), Mapping):
        raise UserError(
            f"{key} ({stage['name']}) has no block `module` with its class and "
            "hyper-parameters: write one in its yaml, or choose another stage."
        )
    for name, value in stage.items():
        if name not in (MODULE, *RUNNER):
            raise UserError(
                f"{key}.{name}={value} stands beside the block `module` of {key}, "
                f"where hyper-parameters are: write {{module: {{{name}: {value}}}}} "
                f"in a yaml, or {key}.{name}={value} on the command line."
            )
    runner = {name: value for name, value in stage.items() if name != MODULE}
    return {**stage[MODULE], **runner}


def class_of(settings: Mapping[str, Any]) -> type["Stage"]:
    """The class of a stage, of its settings in one table or in two blocks.

    Raises:
        UserError: its `_target_` is not a stage.
    """
    # late: a mistyped option is answered before torch is imported
    from tprl.stages.base import Stage

    target = settings.get(MODULE, settings)["_target_"]
    kind = target_at(target)
    if not (inspect.isclass(kind) and issubclass(kind, Stage)):
        raise UserError(f"_target_ {target} is not a stage: derive it from tprl.stages.base.Stage.")
    return kind


@lru_cache
def needs(kind: type["Stage"]) -> frozenset[str]:
    """The arguments of a stage's constructor: what is built for it is among them."""
    return frozenset(arguments_of(kind))


def groups_of(kind: type["Stage"], chained: bool = False) -> frozenset[str]:
    """The groups of the command line that a stage reads; in a chain its selector is the policy."""
    named = needs(kind) - ({"selector"} if chained else set())
    return frozenset(group for name, group in BUILT_FROM.items() if name in named)


def adapts(kind: type["Stage"]) -> bool:
    """Whether a stage trains adapters of the language model."""
    return "adapter" in needs(kind)


def in_two_blocks(config: DictConfig) -> DictConfig:
    """The settings of a run of before there were two blocks, with its stages as they are written
    now."""
    stage = config.get("stage")
    if stage is None:
        return config
    for key, part in stage.items():
        if OmegaConf.is_dict(part) and "_target_" in part and key != MODULE:
            OmegaConf.update(config, f"stage.{key}", _split(part), merge=False)
    if "_target_" in stage:
        OmegaConf.update(config, "stage", _split(stage), merge=False)
    elif "chain" not in stage and MODULE not in stage:
        names = [
            str(key) for key, part in stage.items() if OmegaConf.is_dict(part) and MODULE in part
        ]
        OmegaConf.update(config, "stage.chain", names, force_add=True)
    return config


def _split(stage: Any) -> DictConfig:
    module = {key: value for key, value in stage.items() if key not in RUNNER}
    return OmegaConf.create(
        {MODULE: module, **{key: value for key, value in stage.items() if key in RUNNER}}
    )
