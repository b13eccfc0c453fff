#!/usr/bin/env bash
# What turns logits into a set, trained and served alike; needs bases.sh (dpp) and ablation_steps.
source "$(dirname "$0")/../common.sh"
train ppo_topk stage=ppo stage.init_from=$B/0/lfd policy.select=topk
rm -rf runs/study/gumbel && cp -r runs/study/ppo_topk runs/study/gumbel # trained alike: only serving draws
sed -i "s/\"select\": \"topk\"/\"select\": \"gumbel\"/" runs/study/gumbel/pruner/config.json
evaluate ablation_select "dpp: $B/0, topk: runs/study/ppo_topk, gumbel: runs/study/gumbel, \
    dpp_3_steps: runs/study/steps_3" \
    keep_ratios=[0.3333,0.1111,0.0556]
