"""From a command line to the files of a run: the only code that knows Hydra."""
