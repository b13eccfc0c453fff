#!/usr/bin/env bash
# The runs that the studies share: the whole chain with five seeds (13 minutes each, one core).
source "$(dirname "$0")/common.sh"
.venv/bin/python -m src.train -m experiment=demo seed=0,1,2,3,4 stage.evaluation.limit=100 \
    hydra.sweep.dir=$B 'hydra.sweep.subdir=${seed}'
