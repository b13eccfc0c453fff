#!/usr/bin/env bash
# Where PPO starts, what serves its logits, and rewards dealt to the wrong episodes; needs bases.sh (seed 0 of the former recipe).
source "$(dirname "$0")/../common.sh"
S=runs/study
B=${B}_former
former() { train "$1" stage=ppo stage.iterations=200 stage.lr_actor=1e-3 "${@:2}"; }
former permuted stage.init_from=$B/0/lfd reward=permuted
former scratch_0 stage.init_from=$B/0/autoencoder
former ppo_topk stage.init_from=$B/0/lfd policy.select=topk
evaluate start "ppo: $B/0, lfd: $B/0/lfd, untrained: $B/0/autoencoder, ppo_scratch: $S/scratch_0, topk: $S/ppo_topk, \
    permuted: $S/permuted" pruners=[attention_dpp] keep_ratios=[0.3333,0.1111,0.0556,0.0278]
