"""Texts for readers with a grammar of their own: bash, OmegaConf, and who types the options of a
stage."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

MODULE = "module"  # the block of a stage's yaml that holds its hyper-parameters
INTERPOLATION = re.compile(r"(\\*)\$\{")


def quoted(word: str) -> str:
    """A word as bash reads it. What a terminal cannot show (line breaks, bytes that are no text)
    becomes $'\\x..'."""
    if word.isprintable() and _can_be_printed(word):
        return shlex.quote(word)
    return "$'" + "".join(map(_byte, os.fsencode(word))) + "'"


def escaped(value: Any) -> Any:
    """Plain containers whose texts OmegaConf reads as they are: `${` would begin an
    interpolation."""
    if isinstance(value, str):
        # Backslashes before `${` count double once it is escaped.
        return INTERPOLATION.sub(lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list | tuple) else value


def unescaped(value: Any) -> Any:
    """What OmegaConf makes of a text without interpolations."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\+)\$\{", lambda match: match[1][: len(match[1]) // 2] + "${", value)


def _can_be_printed(word: str) -> bool:
    try:
        word.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _byte(code: int) -> str:
    character = chr(code)
    plain = code < 128 and character.isprintable() and character not in "\\'"
    return character if plain else f"\\x{code:02x}"


def in_short(word: str) -> str:
    """An option of a stage as one types it, without the block of its yaml: `stage.module.lr=1` as
    `stage.lr=1`."""
    key, equals, value = word.partition("=")
    names = key.split(".")
    if names[0].lstrip("+~") == "stage":
        key = ".".join(name for name in names if name != MODULE)
    return f"{key}{equals}{value}"
