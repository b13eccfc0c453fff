#!/usr/bin/env bash
# The gates of the embedded LVLM: does pruning hurt it where it should, and do the field's signals mean something on it?
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m src.eval logger=csv hydra.run.dir=runs/tiny_llava_gates \
  pruners=[oracle,random,uniform,pooling,cls_attention,vispruner,divprune] seeds=[0,1,2] \
  keep_ratios=[0.5,0.3333,0.2222,0.1111,0.0556] batch_size=100 "$@"
cp runs/tiny_llava_gates/results.csv experiments/tiny_llava/results.csv
