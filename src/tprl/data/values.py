"""Values of options and columns: one value where a list may stand, and texts that name
something."""

from collections.abc import Mapping
from typing import Any

from tprl.errors import UserError

LONGEST = 80  # characters of a value in an error


def several(value: Any) -> list[Any]:
    """One value or a list of values, as a list; None is an empty list.

    A text is one value: its letters are never taken for the values of a list.
    """
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        return [value]
    return list(value)


def name_list(key: str, value: Any) -> list[str]:
    """One name or a list of names, as a list.

    Args:
        key: the option, for the error.

    Raises:
        UserError: a value is no text, or empty.
    """
    values = several(value)
    for name in values:
        if not isinstance(name, str) or not name.strip():
            raise UserError(
                f"{key}={value!r} holds {name!r}, which is not a "
                f"name: write {key}=<name>, or {key}=[<name>,<name>]."
            )
    return values


def shortened(value: Any) -> str:
    """A value as an error shows it: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
