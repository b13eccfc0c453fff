#!/usr/bin/env bash
# One policy for all keep ratios against one per ratio; needs bases.sh (all).
source "$(dirname "$0")/../common.sh"
train one_9 stage=ppo stage.init_from=$B/0/lfd stage.keep_ratio=0.1111
train one_18 stage=ppo stage.init_from=$B/0/lfd stage.keep_ratio=0.0556
evaluate budget_conditioned "all: $B/0, only_1_9: runs/study/one_9, only_1_18: runs/study/one_18" \
    keep_ratios=[0.3333,0.1111,0.0556]
