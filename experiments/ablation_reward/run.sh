#!/usr/bin/env bash
# What the policy is rewarded for; needs bases.sh (change of the reference answer's likelihood).
source "$(dirname "$0")/../common.sh"
S=runs/study
for seed in 0 1 2; do
    train fidelity_$seed stage=ppo stage.init_from=$B/$seed/lfd reward=fidelity seed=$seed
done
train score_change stage=ppo stage.init_from=$B/0/lfd reward=score_change
train flops_saved stage=ppo stage.init_from=$B/0/lfd reward=flops_saved stage.budget=free
train agreement stage=ppo stage.init_from=$B/0/lfd reward=fidelity 'reward.terms.fidelity.agreement=1.0'
evaluate ablation_reward "log_likelihood: [$B/0, $B/1, $B/2], fidelity: [$S/fidelity_0, $S/fidelity_1, $S/fidelity_2], agreement: $S/agreement, score_change: $S/score_change, flops_saved: $S/flops_saved, lfd: [$B/0/lfd, $B/1/lfd, $B/2/lfd]" \
    keep_ratios=[0.3333,0.1111,0.0556]
