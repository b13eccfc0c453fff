#!/usr/bin/env bash
# results.csv, ablation.csv and profile.txt; about ten minutes of two quiet cores. run.sh --quick: one minute, writes elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
PYTHONPATH=src .venv/bin/python experiments/speed/ppo/bench.py "$@"
[[ "${1:-}" == --quick ]] || PYTHONPATH=src .venv/bin/python experiments/speed/ppo/profile_ppo.py
