"""What an option may hold. A kind checks a value, puts a single one into a list where a list is
meant, and refuses anything else in one sentence that names the option, the value and the remedy."""

import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tprl.errors import UserError

Kind = Callable[[str, Any], Any]  # (name of the option, value) -> value; raises UserError
FINITE = sys.float_info.max
LARGEST = 2**31 - 1  # of counts: what loops, tensors and generators take everywhere


@dataclass(frozen=True)
class Number:
    """A finite number.

    Args:
        low, high: bounds; the number itself is allowed, except with `above` (low) or `below`
            (high).
        whole: no fractions.
        null: what null means, where it is allowed.
        example: a good value.
    """

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    null: str = ""
    example: str = ""

    def __call__(self, key: str, value: Any) -> Any:
        if value is None and self.null:
            return None
        if not self.holds(value):
            raise UserError(
                f"{key} must be {self.in_words(value)}, got {typed(value)}; {self._remedy()}."
            )
        return value

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number. True and False are none, and neither is text."""
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -FINITE <= value <= FINITE
        ):
            return False
        if self.whole and not isinstance(value, int):
            return False
        low, high = self.low < value or (value == self.low and not self.above), self.high > value
        return low and (high or (value == self.high and not self.below))

    def in_words(self, value: Any = None) -> str:
        """What such a number is; a bound that is there for machines only where `value` breaks
        it."""
        noun = "a whole number" if self.whole else "a number"
        if math.isinf(self.low):
            return noun
        broken = isinstance(value, int) and value > self.high
        if self.high >= LARGEST and not broken:
            return (
                f"{noun} above {self.low:g}" if self.above else f"{noun} of at least {self.low:g}"
            )
        if self.whole:
            return f"{noun} from {self.low} to {self.high}"
        return (
            f"{noun} in {'(' if self.above else '['}{self.low:g}, "
            f"{self.high:g}{')' if self.below else ']'}"
        )

    def _remedy(self) -> str:
        null = f", or null for {self.null}" if self.null else ""
        return f"use e.g. {self.example or f'{max(self.low, 1):g}'}{null}"


@dataclass(frozen=True)
class OneOf:
    """One of several words; `null` says whether null is one of them."""

    words: Collection[str] | Callable[[], Collection[str]]
    null: bool = False
    group: bool = False  # of files: any other name does not exist

    def __call__(self, key: str, value: Any) -> Any:
        words = self.words() if callable(self.words) else self.words
        if value in words if isinstance(value, str) else value is None and self.null:
            return value
        known = [*words, "null"] if self.null else [*words]
        if self.group:
            raise UserError(
                f"{key}={typed(value)} does not exist; choose one of: {', '.join(known)}."
            )
        listed = f"{', '.join(known[:-1])} or {known[-1]}" if known[1:] else known[0]
        raise UserError(f"{key} must be {listed}, got {typed(value)}.")


@dataclass(frozen=True)
class Listed:
    """A list of one kind; a single value is a list of one, or stands for all items where their
    number is fixed.

    Args:
        item: what it holds.
        least: items at least.
        exactly: their number, where it is fixed.
        distinct: no item twice.
        single: a single value stays single.
        null: null is allowed, and says that there is no list.
        purpose: what an empty one leaves nothing for.
    """

    item: Kind
    least: int = 1
    exactly: int | None = None
    distinct: bool = False
    single: bool = False
    null: bool = False
    purpose: str = "work with"

    def __call__(self, key: str, value: Any) -> Any:
        if value is None and self.null:
            return None
        if isinstance(value, Mapping) or not isinstance(value, Sequence) or isinstance(value, str):
            items = [self.item(key, value)] * (self.exactly or 1)
            if self.single:
                return items[0]
        else:
            items = [self.item(key, item) for item in value]
        needed = self.exactly or self.least
        if len(items) < needed or (self.exactly and len(items) > needed):
            bound = f"{needed} of them" if self.exactly else f"at least {needed}"
            count = f"has {len(items)} value{'s' * (len(items) > 1)}"
            what = count if items else f"leaves nothing to {self.purpose}"
            raise UserError(f"{key}={typed(value)} {what}: name {bound}.")
        double = next((item for i, item in enumerate(items) if item in items[:i]), None)
        if self.distinct and double is not None:
            raise UserError(f"{key}={typed(value)} names {typed(double)} twice: name each once.")
        return items


def flag(key: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise UserError(f"{key} must be true or false, got {typed(value)}.")
    return value


def text(key: str, value: Any) -> str:
    """A text. Hydra reads the name of a folder such as 2024 as a number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{key} must be a text, got {typed(value)}; put "
            "quotes around one that looks like something else."
        )
    return value


def text_or_null(key: str, value: Any) -> str | None:
    """A text, or null; an empty one is as good."""
    return value if value in (None, "") else text(key, value)


def table(key: str, value: Any) -> Mapping[Any, Any]:
    """A table of names and values."""
    if not isinstance(value, Mapping):
        raise UserError(
            f"{key} must be a table, got {typed(value)}; write {key}={{name: value, ...}}."
        )
    return value


def anything(key: str, value: Any) -> Any:
    """Whatever its reader takes; it is checked there."""
    return value


def typed(value: Any) -> str:
    """A value as one types it: `[0.1,null]`; texts that look like something else in quotes."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, str):
        return f"'{value}'" if not value.strip() or _looks_otherwise(value) else value
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _looks_otherwise(value: str) -> bool:
    """Whether a text, without quotes, would be a number, true, false or null."""
    try:
        json.loads(value.lower())
    except ValueError:
        return value.lower().lstrip("+-") in ("nan", "inf") or value[:1] in "[{"
    return True
