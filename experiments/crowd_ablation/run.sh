#!/usr/bin/env bash
# What decides in `crowd`: the start, the teacher, the set, the reward, the question and the kinds of questions. One seed; needs crowd/run.sh (its seed 0).
source "$(dirname "$0")/../common.sh"
C=runs/study/crowd_train/0
S=runs/study/crowd_ablation
WORLD=(model=tiny_crowd dataset=crowd threads=1)
ppo() { # NAME START OPTION...
    train "crowd_ablation/$1" stage=ppo "${WORLD[@]}" stage.iterations=120 stage.lr_actor=3e-4 "stage.init_from=$2" "${@:3}"
}
ppo scratch "$C/autoencoder"
ppo topk "$C/lfd" policy.select=topk
ppo fidelity "$C/lfd" reward=fidelity
ppo permuted "$C/lfd" reward=permuted
ppo no_count "$C/lfd" 'dataset.families=[attribute,existence,relation,neighbor,grounding]'
# As many token passes as PPO: whole prompts with gradients, a backward pass counted twice.
train crowd_ablation/distill stage=distill "${WORLD[@]}" stage.iterations=150 "stage.init_from=$C/lfd" \
    'stage.keep_ratio=[0.1111,0.0556,0.0278]' 'stage.served.keep_ratios=[0.1111,0.0556,0.0278]'
train crowd_ablation/blind stage=all 'stage.chain=[autoencoder,lfd,ppo]' 'stage.baselines=[]' stage.evaluation.limit=60 \
    'stage.evaluation.pruners=[random]' 'stage.evaluation.keep_ratios=[0.0556]' "${WORLD[@]}" pruner=word_attention "${QUESTION[@]}" policy.query=none
evaluate crowd_ablation "tprl: $C, lfd: $C/lfd, untrained: $C/autoencoder, scratch: $S/scratch, distill: $S/distill, blind: $S/blind, \
    blind_lfd: $S/blind/lfd, topk: $S/topk, fidelity: $S/fidelity, permuted: $S/permuted, no_count: $S/no_count" \
    "${WORLD[@]}" pruners=[attention_words,word_attention] limit=2000 'keep_ratios=[0.1111,0.0556,0.0278]'
