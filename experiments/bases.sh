#!/usr/bin/env bash
# The runs that the studies share: the whole chain with five seeds (20 minutes each, one core), and with the former recipe (13).
source "$(dirname "$0")/common.sh"
sweep() { # FOLDER OPTION...
    .venv/bin/python -m src.train -m experiment=demo seed=0,1,2,3,4 threads=1 stage.evaluation.limit=100 \
        "hydra.sweep.dir=$1" 'hydra.sweep.subdir=${seed}' "${@:2}"
}
sweep "$B"
sweep "${B}_former" "${FORMER[@]}"
