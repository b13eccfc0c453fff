"""Train a stage, or all of them: python -m src.train stage=ppo model=tiny_llava."""

from tprl.commands.entry import launch

if __name__ == "__main__":
    launch("train", "tprl.commands.train:train")
