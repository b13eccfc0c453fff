#!/usr/bin/env bash
# Demonstrations that read the question, then PPO; the same from demonstrations that do not, with the recipe of `scenes`; rules without learning.
source "$(dirname "$0")/../common.sh"
C=runs/study/crowd_train
chain() { # NAME OPTION...
    .venv/bin/python -m src.train -m stage=all 'stage.chain=[autoencoder,lfd,ppo]' 'stage.baselines=[]' stage.evaluation.limit=60 \
        'stage.evaluation.pruners=[random]' 'stage.evaluation.keep_ratios=[0.0556]' model=tiny_crowd dataset=crowd logger=csv threads=1 \
        "hydra.sweep.dir=$C" "hydra.sweep.subdir=$1" "${@:2}"
}
for seed in 0 1 2; do
    chain "$seed" "seed=$seed" pruner=word_attention "${QUESTION[@]}"
    chain "blind_start_$seed" "seed=$seed" "${FORMER[@]}"
done
chain joined_start seed=0 pruner=attention_words "${QUESTION[@]}"
chain blind seed=0 policy.query=none "${FORMER[@]}"
for seed in 0 1 2; do # the learned rivals: as many token passes
    .venv/bin/python -m src.train -m stage=distill policy=selector stage.iterations=150 'stage.keep_ratio=[0.2222,0.1111,0.0556,0.0278]' \
        'stage.served.keep_ratios=[0.1111,0.0556,0.0278]' model=tiny_crowd dataset=crowd logger=csv threads=1 "seed=$seed" \
        "hydra.sweep.dir=$C" "hydra.sweep.subdir=selector_$seed"
done
R=runs/study/crowd
final() { # NAME OPTION...
    .venv/bin/python -m src.eval model=tiny_crowd dataset=crowd split=final limit=2000 logger=none threads=1 \
        keep_ratios=[0.1111,0.0556,0.0278] "hydra.run.dir=${R}_$1" "${@:2}"
}
final learned "runs={tprl: [$C/0, $C/1, $C/2], tprl_lfd: [$C/0/lfd, $C/1/lfd, $C/2/lfd]}"
final blind_start "runs={blind_start: [$C/blind_start_0, $C/blind_start_1, $C/blind_start_2],
    blind_start_lfd: [$C/blind_start_0/lfd, $C/blind_start_1/lfd, $C/blind_start_2/lfd], blind: $C/blind,
    joined_start: $C/joined_start, joined_start_lfd: $C/joined_start/lfd}"
final rules pruner=word_attention \
    'pruners=[keyword_color,attention_words,attention_color,attention_dpp,mmr_attention,scope,question_dpp,vispruner,divprune,cdpruner,trim,random,oracle,oracle_dpp]'
final selector "runs={selector: [$C/selector_0, $C/selector_1, $C/selector_2]}" 'pruners=[resize]'
for seed in 0 1 2; do final "mmr_$seed" pruner=scorer_mmr "pruner.pretrained=$C/selector_$seed"; done
.venv/bin/python experiments/merge.py experiments/crowd ${R}_learned ${R}_blind_start ${R}_rules ${R}_selector \
    ${R}_mmr_0@0 ${R}_mmr_1@1 ${R}_mmr_2@2
