"""The page of `python -m src.demo`."""
