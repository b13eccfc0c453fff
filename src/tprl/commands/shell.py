"""Commands that can be pasted: every command that TPRL prints or writes comes from here.

A value passes two readers, bash and Hydra, and each has a grammar of its own: a path may hold
spaces, quotes, umlauts, `=`, `,`, brackets, `$` or backslashes.
"""

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from tprl.runtime.quoting import escaped, quoted, unescaped


def command(entry: str, *words: str) -> str:
    """`python -m src.<entry> ...` as bash reads it.

    Args:
        entry: "train", "eval" or "demo".
        words: options as Hydra reads them, as they were typed or as `option` writes them.
    """
    return " ".join(["python", "-m", f"src.{entry}", *map(quoted, words)])


def option(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it."""
    return f"{key}={_written(value)}"


def value_of(word: str) -> Any:
    """The value of `key=value` as Hydra reads it; None for null and for a word that sets nothing.

    Raises:
        HydraException: it cannot be read.
    """
    parsed = OverridesParser.create().parse_override(word)
    return None if parsed.is_sweep_override() else unescaped(parsed.value())


def _written(value: Any) -> str:
    if isinstance(value, str):
        text = escaped(value)
        return text if _reads_back(text) else QuotedString(text, Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return "null" if value is None else str(value).lower()


def _reads_back(text: str) -> bool:
    """Whether Hydra reads a text without quotes as itself, alone and in a list."""
    if "${" in text:
        return False
    try:
        alone, listed = OverridesParser.create().parse_overrides([f"x={text}", f"x=[{text}]"])
    except HydraException:
        return False
    return not alone.is_sweep_override() and alone.value() == text and listed.value() == [text]
