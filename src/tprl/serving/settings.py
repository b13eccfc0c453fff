"""What a served folder says about its pruner: keys of `config.json`, readable by an engine's
plugin."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tprl.budget import budget, check_keep_ratio
from tprl.errors import UserError
from tprl.lvlm.layer_drop import LayerPruner
from tprl.pruners.adaptive import Adaptive
from tprl.pruners.base import make_pruner
from tprl.pruners.keyword_budget import KeywordBudget
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.pruners.scorer_mmr import ScorerMMR
from tprl.pruners.tprl import TPRL
from tprl.types import Pruner

FOLDER = "pruner"  # beside the weights; holds a learned pruner
PREFIX = "tprl_"  # of our keys in a stock config
POSITIONS = ("keep", "compact")


@dataclass(frozen=True)
class Settings:
    """How a served model prunes.

    Args:
        pruner: a node with `_target_` for a method without weights; empty for the pruner in
            `FOLDER`.
        keep_ratio: kept fraction of each image's visual tokens, in (0, 1].
        positions: "keep" leaves survivors at their places, "compact" closes the gaps.

    Raises:
        UserError: a ratio outside (0, 1], or unknown positions.
    """

    keep_ratio: float
    positions: str = "keep"
    pruner: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A frozen dataclass sets its own fields like this; the number may come as an int from json.
        object.__setattr__(self, "keep_ratio", check_keep_ratio(self.keep_ratio))
        if self.positions not in POSITIONS:
            raise UserError(f"positions={self.positions} is unknown: use keep or compact.")

    @property
    def keys(self) -> dict[str, Any]:
        """What goes into `config.json`."""
        return {
            f"{PREFIX}keep_ratio": self.keep_ratio,
            f"{PREFIX}positions": self.positions,
            f"{PREFIX}pruner": dict(self.pruner),
        }

    @classmethod
    def of(cls, config: Any) -> "Settings":
        """The settings that a stock config object carries.

        Raises:
            UserError: it carries none, or values that cannot be.
        """
        # All or none: a folder with some of them was edited, and a default would hide that.
        names = ("keep_ratio", "positions", "pruner")
        missing = [f"{PREFIX}{name}" for name in names if not hasattr(config, f"{PREFIX}{name}")]
        if missing:
            raise UserError(
                f"the config of this model has no {', '.join(missing)}: serve a folder that "
                "`python -m src.export target=vllm` wrote."
            )
        return cls(**{name: getattr(config, f"{PREFIX}{name}") for name in names})

    def tokens(self, unpruned: int) -> int:
        """Visual tokens that are left of an image with that many."""
        return budget(self.keep_ratio, unpruned)

    def load(self, folder: str | Path) -> Pruner:
        """The pruner, checked for what an engine can give it.

        Raises:
            UserError: it is not there, or cannot be served.
        """
        # Rules are rebuilt from the config; a policy has weights, which lie beside the model's.
        if self.pruner:
            pruner = make_pruner(self.pruner)
        elif (Path(folder) / FOLDER).is_dir():
            pruner = load_pruner(Path(folder) / FOLDER)
        else:
            raise UserError(
                f"{folder} has no folder {FOLDER}/ with its pruner: download the whole export, or "
                "write it again by `python -m src.export`."
            )
        check_servable(pruner)
        return pruner


def check_servable(pruner: Any) -> None:
    """Refuse a pruner that needs what an engine does not give: counts must be known before the
    vision tower runs, and only projected tokens and the question's words are at hand.

    Raises:
        UserError: with the reason.
    """
    # The most particular reason first: a reranker has extras too, and what it wraps would do.
    name = pruner.name
    if isinstance(pruner, Adaptive | KeywordBudget):
        raise UserError(
            f"pruner {name} gives every question its own budget, and an "
            "engine must know the number of tokens before the vision "
            "tower runs: serve pruner=tprl with a fixed keep_ratio."
        )
    if isinstance(pruner, ScorerMMR):
        raise UserError(
            f"pruner {name} reranks what {pruner.pruner.name} scores, and an export "
            f"carries no pruner inside another: serve {pruner.pruner.name}."
        )
    if pruner.core_share is not None:
        raise UserError(
            f"pruner {name} keeps a core for a conversation, and an export carries no pruner "
            "inside another: serve pruner=divprune, which every turn keeps alike, or a policy."
        )
    if isinstance(pruner, LayerPruner):
        raise UserError(
            f"pruner {name} drops tokens between layers of the language model, "
            "which engines do not allow: use pruner=divprune or a trained policy."
        )
    if pruner.extras:
        raise UserError(
            f"pruner {name} reads {', '.join(sorted(pruner.extras))} of the vision "
            "tower, which engines do not give: use pruner=divprune or a trained policy."
        )
    if isinstance(pruner, LearnedPruner) and pruner.serving.select == "threshold":
        raise UserError(
            f"pruner {name} selects by a threshold, so the number of tokens is not known "
            "before the vision tower runs: train it with policy.select=dpp or topk."
        )


def check_weights(lvlm: Any) -> None:
    """Refuse weights that were changed or spread on the way in: an export writes those of the
    checkpoint.

    Raises:
        UserError: they were.
    """
    # A GPU is a map of its own where accelerate loads straight onto it: only several places are a
    # spread.
    places = {str(place) for place in getattr(lvlm.model, "hf_device_map", {}).values()}
    # Offloaded to disk, weights stand on the meta device.
    away = any(weight.is_meta for weight in lvlm.model.parameters())
    if getattr(lvlm.model, "is_quantized", False) or len(places) > 1 or away:
        raise UserError(
            f"the weights of {lvlm.name} are quantized or spread over devices, "
            "and an export writes them whole: leave model.load_in and "
            "model.placement out, and take a checkpoint that is not quantized."
        )


def sees_other_images(pruner: Any) -> bool:
    """Whether what it keeps of an image depends on the other images of the prompt. An engine
    encodes and caches image by image."""
    return isinstance(pruner, TPRL)
