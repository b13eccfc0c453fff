"""Try pruners in a browser: python -m src.demo, python -m src.demo run=<directory>."""

from tprl.commands.entry import launch

if __name__ == "__main__":
    launch("demo", "tprl.commands.demo:demo")
