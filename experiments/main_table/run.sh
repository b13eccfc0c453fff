#!/usr/bin/env bash
# Every pruner on 5,000 test questions at five keep ratios; needs experiments/bases.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
B=runs/study/base
.venv/bin/python -m src.eval logger=none limit=5000 batch_size=100 hydra.run.dir=runs/study/main_table \
    "runs={tprl: [$B/0, $B/1, $B/2], tprl_lfd: [$B/0/lfd, $B/1/lfd, $B/2/lfd], mlp: $B/0/mlp}" \
    'pruners=[random,uniform,pooling,cls_attention,vispruner,divprune,oracle]'
cp runs/study/main_table/{results.csv,paired.json,pareto.svg} experiments/main_table/
