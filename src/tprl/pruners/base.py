"""What a pruner may say of itself, with the defaults of one that says nothing."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tprl.build import build, load_component
from tprl.cost import Grid, LVLMShape
from tprl.errors import UserError


class BasePruner:
    """Every pruner derives from it, so that nothing has to ask whether an attribute exists.

    `types.Pruner` is what one before the language model must do, `lvlm.layer_drop.LayerPruner` what
    one inside it must do. An attribute is `Any` where some subclasses always have it: to them it
    is never None.
    """

    name: str
    extras: frozenset[str] = frozenset()  # what it reads beside the projected tokens
    reads_question = False  # whether its choice depends on the question
    decides_alone = False  # whether it can choose how many tokens live (keep_ratio None)
    replaces_tokens = False  # whether it keeps none of the tokens, and makes new ones
    shows_smaller_images = False  # whether the vision side sees other images, see `tiles`
    seed: Any = None  # of one that draws; None: it does not
    # share of the budget that is the same for every question about an image; None: it has no core
    core_share: Any = None
    # pruners that choose one after the other, and which share of the budget each has
    choosers: Sequence[tuple[Any, float]] = ()

    # What only a policy has: its LVLM and data, how it serves (`pruners.serving.Serving`), the
    # width of the tokens that it reads, and the folder that it was loaded from.
    trained_on: Any = MappingProxyType({})
    serving: Any = None
    token_width: Any = None
    folder: Path | None = None

    @property
    def learned(self) -> Any:
        """The pruner whose weights and serving count: the policy inside, where there is one."""
        return self

    def check_reach(self, keep_ratio: float | None, shape: LVLMShape) -> None:
        """Refuse a ratio that it cannot have, before anything is encoded.

        Raises:
            UserError: it cannot.
        """

    def flops_by_part(self, tokens: int, words: int, kept: int) -> dict[str, int] | None:
        """What choosing costs on one prompt, all its images together; None: it goes image by image,
        and `flops` says what one costs."""
        return None

    def tiles(self, shape: LVLMShape, tiles: Sequence[Grid], kept: int) -> Sequence[Grid]:
        """Patches (rows, columns) of each pass of the vision tower over an image of which `kept`
        tokens stay; `tiles` are those without pruning."""
        return tiles


def checked_pruner(pruner: Any, spec: str) -> Any:
    """The pruner, if it has what every pruner has; `spec` is how it was asked for.

    Raises:
        UserError: its class does not derive from `BasePruner`.
    """
    if not isinstance(pruner, BasePruner):
        raise UserError(
            f"{spec} does not derive from tprl.pruners.base.BasePruner: derive it, as "
            "docs/howto-pruner.md shows."
        )
    return pruner


def make_pruner(config: Any, **live: Any) -> Any:
    """The pruner of a config.

    Raises:
        UserError: its class does not derive from `BasePruner`, or it cannot be built.
    """
    return checked_pruner(build(config, **live), f"pruner._target_={config['_target_']}")


def named_pruner(name: str, **live: Any) -> Any:
    """A pruner of conf/pruner.

    Raises:
        UserError: as for `make_pruner`.
    """
    return checked_pruner(load_component("pruner", name, **live), f"pruner={name}")
