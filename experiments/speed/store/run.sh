#!/usr/bin/env bash
# Numbers of README.md: 50,000 synthetic demonstrations of LLaVA-1.5 size, the first writer killed half-way.
# Takes 6 GB of disk for some minutes, below FOLDER (default: runs/store-study), and deletes them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
PYTHONPATH=src OMP_NUM_THREADS=1 .venv/bin/python experiments/speed/store/measure.py "${1:-runs/store-study}" --kill |
    tee /dev/stderr | sed -n '/^{/,$p' > experiments/speed/store/results.json
