"""TPRL: visual-token pruning for vision-language models, learned by demonstrations and PPO."""

__version__ = "0.1.0"
