#!/usr/bin/env bash
# Where a policy starts and what teaches it; needs experiments/bases.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
B=runs/study/base
.venv/bin/python -m src.train stage=ppo stage.init_from=$B/0/autoencoder logger=csv hydra.run.dir=runs/study/scratch_0
.venv/bin/python -m src.train stage=distill stage.init_from=$B/0/lfd logger=csv hydra.run.dir=runs/study/distill_0
.venv/bin/python -m src.eval logger=none limit=5000 batch_size=100 hydra.run.dir=runs/study/ablation_init \
    "runs={ppo: $B/0, lfd: $B/0/lfd, ppo_scratch: runs/study/scratch_0, distill: runs/study/distill_0}"
cp runs/study/ablation_init/{results.csv,paired.json,pareto.svg} experiments/ablation_init/
