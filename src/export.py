"""Write a folder that an engine serves: python -m src.export run=<directory> target=vllm."""

from tprl.commands.entry import launch

if __name__ == "__main__":
    launch("export", "tprl.commands.export:export")
