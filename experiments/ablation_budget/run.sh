#!/usr/bin/env bash
# How episodes are held to a budget of 1/9; needs bases.sh and budget_conditioned (exact_k).
source "$(dirname "$0")/../common.sh"
train budget_lagrange stage=ppo stage.init_from=$B/0/lfd stage.budget=lagrange stage.keep_ratio=0.1111
evaluate ablation_budget "exact_k: runs/study/one_9, lagrange: runs/study/budget_lagrange" \
    keep_ratios=[0.3333,0.1111,0.0556]
