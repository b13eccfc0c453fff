#!/usr/bin/env bash
# The runs that the studies share: autoencoder, demonstrations, LfD and PPO with three seeds (5 minutes each, 2 cores).
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m src.train -m experiment=demo seed=0,1,2 stage.evaluation.limit=100 \
    hydra.sweep.dir=runs/study/base 'hydra.sweep.subdir=${seed}'
