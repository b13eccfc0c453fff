#!/usr/bin/env bash
# Runs of the whole command line, killed at random moments and resumed; 20 minutes on 2 cores. --quick: 3 kills.
set -euo pipefail
cd "$(dirname "$0")/../../.."
.venv/bin/python experiments/speed/survival/kill.py "$@"
