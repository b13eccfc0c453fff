#!/usr/bin/env bash
# How episodes are held to a budget; needs bases.sh (exact_k).
source "$(dirname "$0")/../common.sh"
train budget_lagrange stage=ppo stage.init_from=$B/0/lfd stage.budget=lagrange stage.keep_ratio=0.1111
train budget_free stage=ppo stage.init_from=$B/0/lfd stage.budget=free reward=score_change
evaluate ablation_budget "exact_k: $B/0, lagrange: runs/study/budget_lagrange, free: runs/study/budget_free" \
    keep_ratios=[0.3333,0.1111,0.0556]
