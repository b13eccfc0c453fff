#!/usr/bin/env bash
# run.sh [ROUNDS] [DEVICE]: about half a minute per round on 2 quiet cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
PYTHONPATH=src .venv/bin/python experiments/speed/selectors/bench.py "${1:-7}" \
    "experiments/speed/selectors/results${2:+_$2}.csv" "${2:-cpu}"
