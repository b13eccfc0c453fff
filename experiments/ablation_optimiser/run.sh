#!/usr/bin/env bash
# How the advantage of an episode is estimated; needs bases.sh (leave-one-out).
source "$(dirname "$0")/../common.sh"
for advantage in grpo gae; do
    train $advantage stage=ppo stage.init_from=$B/0/lfd stage.advantage=$advantage
done
evaluate ablation_optimiser "rloo: $B/0, grpo: runs/study/grpo, gae: runs/study/gae" \
    keep_ratios=[0.3333,0.1111,0.0556]
