"""What the arguments of a class may hold, by their annotations."""

import inspect
import types
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tprl.build import target_at
from tprl.errors import UserError
from tprl.kinds import Kind, Listed, Number, OneOf, anything, flag, table, text

FINITE = Number(example="0.1")


@lru_cache
def annotations_of(target: str) -> dict[str, Any]:
    """What the constructor of a class, and of our classes that it hands options to, says of its
    arguments."""
    maker = target_at(target)
    hints: dict[str, Any] = {}
    for part in maker.__mro__ if inspect.isclass(maker) else (maker,):
        if part is not maker and not part.__module__.startswith("tprl."):
            break
        for parameter in inspect.signature(part, eval_str=True).parameters.values():
            if parameter.annotation is not parameter.empty:
                hints.setdefault(parameter.name, parameter.annotation)
    return hints


def kind_of(annotation: Any) -> Kind:
    """What an argument may hold by its annotation; what we do not know is left to its class."""
    simple: dict[Any, Kind] = {bool: flag, int: Number(whole=True), float: FINITE, str: text}
    if annotation in simple:
        return simple[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:  # bounds beside the argument: Annotated[float, Number(0, 1)]
        return next((part for part in parts[1:] if callable(part)), kind_of(parts[0]))
    if origin in (Union, types.UnionType):
        kinds = [kind_of(part) for part in parts if part is not type(None)]
        return anything if anything in kinds else _any_of(kinds, type(None) in parts)
    if origin is Literal and all(isinstance(part, str) for part in parts):
        return OneOf(parts)
    if origin is Sequence:
        return Listed(kind_of(parts[0]), least=0)
    return table if origin in (dict, Mapping) else anything


def _any_of(kinds: Sequence[Kind], null: bool) -> Kind:
    """The first kind that a value is of; the sentence is the first one's."""

    def check(key: str, value: Any) -> Any:
        if value is None and null:
            return None
        for kind in kinds[1:]:
            try:
                return kinds[0](key, value)
            except UserError:
                try:
                    return kind(key, value)
                except UserError:
                    continue
        return kinds[0](key, value)

    return check
