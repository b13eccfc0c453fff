"""Pruning with OpenVINO: `convert` writes a folder, whose `answer.py` (a copy of `runtime.py`)
needs no torch."""
