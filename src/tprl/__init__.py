"""TPRL: visual-token pruning for vision-language models, learned by demonstrations and PPO."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tprl.api import prune
    from tprl.errors import UserError
    from tprl.lvlm.processors import load_processor
    from tprl.lvlm.pruned import Kept, Pruning
    from tprl.pruners.learned import LearnedPruner as Pruner
    from tprl.types import TokenSelection

__version__ = "0.1.0"
__all__ = ["Kept", "Pruner", "Pruning", "TokenSelection", "UserError", "load_processor", "prune"]
_HOMES = {
    "Kept": "tprl.lvlm.pruned",
    "Pruner": "tprl.pruners.learned",
    "Pruning": "tprl.lvlm.pruned",
    "TokenSelection": "tprl.types",
    "UserError": "tprl.errors",
    "load_processor": "tprl.lvlm.processors",
    "prune": "tprl.api",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import tprl` alone does not load
    transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tprl' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), "LearnedPruner" if name == "Pruner" else name)
    globals()[name] = value
    return value
