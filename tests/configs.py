"""The groups of options, and configs as Hydra composes them, each once."""

from functools import lru_cache

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tprl.build import conf_dir

GROUPS = (
    "stage",
    "model",
    "pruner",
    "policy",
    "reward",
    "scorer",
    "dataset",
    "trainer",
    "logger",
    "experiment",
    "debug",
)


@lru_cache
def composed(entry: str, *words: str) -> DictConfig:
    """Every caller of the same words gets the same config: copy it before you change it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose(entry, overrides=list(words))
