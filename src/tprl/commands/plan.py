"""What the parts of a run need of one another, checked by names alone: before anything is loaded or
computed, and under the names that were typed."""

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

from tprl.build import build, current, load_component, target_at
from tprl.commands.stages import adapts, class_of, needs, stages_of
from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.kinds import typed
from tprl.lvlm.adapters import read_adapter
from tprl.pruners.base import make_pruner
from tprl.pruners.folder import find_pruner
from tprl.stages.base import Stage
from tprl.stages.demonstrations import refuse_demonstrator

ANY_WIDTH = 16  # of tokens: a policy that is built to see whether its options go together needs one
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
log = logging.getLogger(__name__)
Plain = Mapping[str, Any]


def check_plan(plain: Plain) -> None:
    """Refuse a training whose parts do not fit.

    Args:
        plain: the resolved config of train, as `options.checked` leaves it.

    Raises:
        UserError: they do not.
    """
    # Cheap refusals first: names, then stages, then whatever needs a class or a folder.
    check_logger(plain)
    _check_cache(plain.get("cache"))
    _check_scorer(plain.get("scorer"))
    # First the rules of the class of a stage, then the rules of the runner.
    stages = {key: (class_of(settings), settings) for key, settings in stages_of(plain).items()}
    for key, (kind, settings) in stages.items():
        kind.check(key, settings, plain)
        _check_steps(key, settings, plain["policy"])
        _check_runner(key, kind, settings)
    learns = any("pruner" in needs(kind) for kind, _ in stages.values())
    # Policies are built on the meta device: their options are checked without any weights.
    if learns:
        _check_policy(plain)
    for kind, settings in stages.values():
        _check_labels(kind, settings, plain)
        # A missing pruner is named by the stage that needs it.
        if "demonstrator" in needs(kind):
            check_demonstrator(plain.get("pruner"))
        if "selector" in needs(kind) and not (plain.get("pruner") or "chain" in plain["stage"]):
            raise UserError(f"stage={settings['name']} needs a pruner: set pruner=<name>.")
    # A chain hands weights on by itself; what a run starts from must exist.
    if "chain" in plain["stage"]:
        _check_chain(plain)
    source = plain["stage"].get("init_from")
    if source and learns:
        find_pruner(source)
    elif source and any(adapts(kind) for kind, _ in stages.values()):
        read_adapter(source)


def check_logger(plain: Plain) -> None:
    """Refuse a mode that W&B does not know, where W&B is the logger."""
    mode = os.environ.get("WANDB_MODE")
    logger = current((plain.get("logger") or {}).get("_target_", ""))
    if mode and mode not in WANDB_MODES and logger == "tprl.runtime.tracking.Tracker":
        known = ", ".join(WANDB_MODES[:3])
        raise UserError(
            f"WANDB_MODE={mode} is unknown to W&B: set it to {known} or shared, or use logger=csv."
        )


def check_demonstrator(pruner: Plain | None) -> None:
    """Refuse what cannot demonstrate."""
    if not pruner:
        raise UserError("stage=lfd needs a demonstrator: set pruner=<name>, e.g. pruner=divprune.")
    refuse_demonstrator(make_pruner(pruner))


def _check_cache(cache: str | None) -> None:
    """Refuse a cache that cannot be written."""
    if cache is None:
        return
    # The cache may not exist yet: its nearest existing parent must be writable.
    there = next(
        folder for folder in (Path(cache), *Path(cache).absolute().parents) if folder.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is not a folder"
        raise UserError(
            f"cache={cache} cannot be used ({there} {why}): "
            "choose another folder, or null for none."
        )


def _check_scorer(scorer: Plain | None) -> None:
    """Refuse an engine that is not installed; a class that needs something says so by
    `check_installed()`."""
    kind: Any = target_at(scorer["_target_"]) if scorer else None
    if hasattr(kind, "check_installed"):
        kind.check_installed()


def _check_steps(key: str, stage: Plain, policy: Plain) -> None:
    """A policy embeds the number of each pruning step."""
    parameters = inspect.signature(target_at(policy["_target_"])).parameters
    if "max_steps" not in parameters or "steps" not in stage:
        return
    # `progressive` lists a ratio per step and then decides over `steps`.
    most = policy.get("max_steps", parameters["max_steps"].default)
    listed = stage.get("progressive")
    steps = len(listed) if listed else stage.get("steps", 1)
    if steps > most:
        cause = f"progressive={typed(listed)} has" if listed else f"steps={steps} are"
        raise UserError(
            f"{key}.{cause} more steps than policy.max_steps={most}: set policy.max_steps={steps}."
        )


def _check_runner(key: str, kind: type[Stage], stage: Plain) -> None:
    """The runner's block: a stage has a use for what stands there, and one that is scored says on
    which questions."""
    # A stage that overrides the hook builds a model by itself, so it reads a blueprint.
    builds = kind.own_arguments.__func__ is not Stage.own_arguments.__func__
    for option, used, why in (
        ("calibrate", kind.trained_to is not Stage.trained_to, "holds the policy to no keep ratio"),
        (
            "served",
            "served" in needs(kind) or stage.get("calibrate"),
            "is not scored on validation questions",
        ),
        ("blueprint", builds, "builds no model"),
        ("init_from", builds or adapts(kind) or "pruner" in needs(kind), "starts from nothing"),
    ):
        if not used and stage.get(option):
            raise UserError(
                f"{key}.{option}={typed(stage[option])} is not "
                f"read: stage={stage['name']} {why}; leave it out."
            )
    # Validation and calibration need ratios, and the questions that they are scored on.
    served = stage.get("served") or {}
    if ("served" in needs(kind) or stage.get("calibrate")) and "keep_ratios" not in served:
        raise UserError(
            f"{key}.served={typed(served)} names no keep ratios to score on validation questions: "
            "write e.g. served: {keep_ratios: [0.3333], limit: 300, first: 0} in its yaml."
        )


def _check_policy(plain: Plain) -> None:
    """Whether the options of the policies go together; weights are neither made nor loaded."""
    policy = plain["policy"]
    baselines = plain["stage"].get("baselines", ())
    # Building draws random numbers; the fork keeps the run's own generator where it was.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        build(policy, token_width=ANY_WIDTH)
        for name in baselines:
            load_component("policy", name, token_width=ANY_WIDTH)
    if policy.get("select") == "threshold" and policy.get("tau") is None:
        raise UserError(
            "policy.select=threshold needs a threshold: set policy.tau, or another policy.select."
        )


def _check_labels(kind: type[Stage], settings: Plain, plain: Plain) -> None:
    """Whether a stage reads answers that the dataset was said not to have."""
    name = settings["name"]
    dataset = plain["dataset"]
    maker = target_at(dataset["_target_"])
    # The yaml decides over the class, since `labelled=false` is how a user declares it.
    kind_of_data = maker if _is_dataset(maker) else BaseDataset
    if dataset.get("labelled", kind_of_data.labelled):
        return
    reward = build(plain["reward"]) if "reward" in needs(kind) else None
    if kind.reads_answers(reward, settings):
        raise no_answers(name, getattr(maker, "name", maker.__name__))


def _is_dataset(maker: Any) -> TypeGuard[type[BaseDataset]]:
    """Whether a target is the class of a dataset; it may be a function that makes one."""
    return inspect.isclass(maker) and issubclass(maker, BaseDataset)


def no_answers(stage: str, dataset: str) -> UserError:
    """What a stage says that reads answers of a dataset which has none."""
    return UserError(
        f"stage={stage} reads answers, and dataset {dataset} has none (dataset.labelled=false): "
        "use stage=lfd, and stage=ppo with reward=fidelity."
    )


def _check_chain(plain: Plain) -> None:
    """What only chains have: stages that hand weights on by themselves, rounds, baselines, an
    evaluation at the end."""
    stage, parts = plain["stage"], stages_of(plain)
    for key, part in parts.items():
        if "pruner" not in needs(class_of(part)) and not adapts(class_of(part)):
            raise UserError(
                f"stage.chain names {part['name']}, which trains no policy: leave it out, and run "
                f"stage={part['name']} alone."
            )
        if part.get("init_from") is not None:
            raise UserError(
                f"{key}.init_from={part['init_from']} would not be read: in "
                f"stage={stage['name']} every stage goes on from the one before. Leave it out, "
                f"or run stage={part['name']} alone."
            )
    _check_rounds(plain, [class_of(part) for part in parts.values()])
    # Names become folders and rows of one table, so each may occur once.
    name = target_at(plain["policy"]["_target_"]).name
    if name in stage["baselines"]:
        raise UserError(
            f"stage.baselines={typed(stage['baselines'])} names "
            f"the policy itself (policy={name}): leave it out."
        )
    ours = {name, f"{name}_lfd", f"{name}_adaptive", *stage["baselines"]}
    double = sorted(ours & {*stage["evaluation"]["pruners"]})
    if double:
        raise UserError(
            f"stage.evaluation.pruners={double[0]} has the name of a pruner that this run "
            "trains: leave it out, and compare with it by src.eval run=<this run> afterwards."
        )


def _check_rounds(plain: Plain, kinds: list[type[Stage]]) -> None:
    """A chain that repeats, or that tunes the language model between stages of the policy."""
    stage, name = plain["stage"], plain["stage"]["name"]
    if not any("pruner" in needs(kind) for kind in kinds):
        raise UserError(
            f"stage.chain={typed(stage['chain'])} trains no policy: add ppo, or run stage=tune."
        )
    if "init_from" in stage and not stage["init_from"]:
        raise UserError(
            f"stage={name} needs a trained policy: give stage.init_from=<run directory>."
        )
    if stage.get("rounds", 1) > 1 and stage["baselines"]:
        raise UserError(
            f"stage.rounds={stage['rounds']} repeats a chain, and stage.baselines="
            f"{typed(stage['baselines'])} are taught once: set stage.baselines=[]."
        )
    # An engine has taken over the weights of before the first stage.
    if plain.get("scorer") and any(map(adapts, kinds)):
        raise UserError(
            f"scorer={typed(plain['scorer']['_target_'])} would read prompts without the adapter "
            "that stage.chain trains: leave scorer out."
        )
