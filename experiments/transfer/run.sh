#!/usr/bin/env bash
# PPO without the counting questions, tested on them; needs bases.sh.
source "$(dirname "$0")/../common.sh"
train transfer_count stage=ppo stage.init_from=$B/0/lfd "+dataset.families=[attribute,existence,relation,grounding]"
evaluate transfer "ppo: $B/0, without_count: runs/study/transfer_count, lfd: $B/0/lfd" \
    dataset=scenes keep_ratios=[0.3333,0.1111,0.0556]
