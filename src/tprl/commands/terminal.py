"""What the command lines say beside their results: log lines, the help page, and what to type
next."""

import logging
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from tprl.build import choices
from tprl.commands.engines import next_line
from tprl.commands.shell import command, option
from tprl.commands.stages import class_of
from tprl.runtime.quoting import in_short

# what a next stage is told again
CARRIED = ("model", "dataset", "policy", "reward", "trainer", "logger", "seed")


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is when a message comes: a live progress bar takes its place, and stays
    below."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr


def register_resolvers() -> None:
    """For the help pages in conf/hydra/help: `${choices:model}` is what a group offers,
    `${brief:...}` a value as one types it."""
    OmegaConf.register_new_resolver("choices", _choices, replace=True)
    OmegaConf.register_new_resolver("brief", _brief, replace=True)


def _choices(group: str) -> str:
    return textwrap.fill(", ".join(choices(group)), 100, subsequent_indent=" " * 14)


def _brief(value: Any) -> str:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return "null" if value is None else str(value).replace(" ", "").replace("'", "")


def next_command(
    name: str, config: DictConfig, words: Sequence[str], directory: Path
) -> str | None:
    """What to type after a finished job, if there is an obvious thing.

    Args:
        name: the entry point, "train", "eval" or "export".
        config: of the job.
        words: its command line.
        directory: its run directory.
    """
    if name == "export":
        return next_line(config, directory)
    if name != "train":
        return None
    if "chain" in config.stage:  # the toy model has no images to ask about
        return (
            command("demo", option("run", str(directory))) if config.model.name != "toy" else None
        )
    follows = class_of(config.stage).next
    if follows is None or (follows.carries and any(_key(word) == "experiment" for word in words)):
        # an experiment's settings belong to stage=all: the next stage would run without them
        return None
    carried = [
        in_short(word.removeprefix("++"))
        for word in words
        if follows.carries and _key(word) in CARRIED
    ]
    first = [word for word in follows.words if word.startswith("stage=")]
    others = [word for word in follows.words if word not in first]
    return command(
        follows.entry,
        *first,
        option(follows.option, str(directory / follows.folder)),
        *others,
        *carried,
    )


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0].partition(".")[0]
