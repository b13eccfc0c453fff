"""Evaluate a run or a pruner: python -m src.eval run=<directory>, or pruner=random."""

from tprl.commands.entry import launch

if __name__ == "__main__":
    launch("eval", "tprl.commands.evaluate:evaluate")
