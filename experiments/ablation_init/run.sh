#!/usr/bin/env bash
# Where a policy starts and what teaches it, three seeds; needs bases.sh.
source "$(dirname "$0")/../common.sh"
for seed in 0 1 2; do
    train scratch_$seed stage=ppo stage.init_from=$B/$seed/autoencoder seed=$seed
    train distill_$seed stage=distill stage.init_from=$B/$seed/lfd seed=$seed
done
S=runs/study
evaluate ablation_init "ppo: [$B/0, $B/1, $B/2], lfd: [$B/0/lfd, $B/1/lfd, $B/2/lfd], untrained: $B/0/autoencoder, \
    ppo_scratch: [$S/scratch_0, $S/scratch_1, $S/scratch_2], distill: [$S/distill_0, $S/distill_1, $S/distill_2]" \
    limit=600 keep_ratios=[0.5,0.3333,0.1111,0.0556]
