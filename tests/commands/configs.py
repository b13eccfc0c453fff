"""Composed configs, changed and checked as a command line would."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from tests.configs import composed

from tprl.commands.options import checked
from tprl.commands.stages import in_full
from tprl.errors import UserError


def config(entry: str, *words: str, **values: Any) -> DictConfig:
    """A config with further values, `stage__lr=1` for `stage.lr=1`."""
    changed = copy.deepcopy(composed(entry, *words))
    for key, value in values.items():
        OmegaConf.update(
            changed, in_full(key.replace("__", ".")), value, merge=False, force_add=True
        )
    return changed


def refused(entry: str, *words: str, **values: Any) -> str:
    return sentence_of(checked, config(entry, *words, **values), entry)


def sentence_of(check: Callable[..., Any], *arguments: Any) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(UserError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message
