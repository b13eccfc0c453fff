#!/usr/bin/env bash
# PPO on 1 and on 2 CPU ranks of one thread each, in turns; needs the policy of ../../bases.sh, and a quiet machine of 2 cores.
set -euo pipefail
cd "$(dirname "$0")/../../.."
.venv/bin/python experiments/speed/ddp/bench.py "${BASE:-runs/study/base/0/lfd}" "$@"
