#!/usr/bin/env bash
# The chain of `scenes`, its recipe unchanged, in a world where the question decides; a policy that is blind to it; rules without learning.
source "$(dirname "$0")/../common.sh"
C=runs/study/crowd_train
chain() { # NAME OPTION...
    .venv/bin/python -m src.train -m stage=all 'stage.chain=[autoencoder,lfd,ppo]' 'stage.baselines=[]' stage.evaluation.limit=60 \
        'stage.evaluation.pruners=[random]' 'stage.evaluation.keep_ratios=[0.0556]' model=tiny_crowd dataset=crowd logger=csv threads=1 \
        "hydra.sweep.dir=$C" "hydra.sweep.subdir=$1" "${@:2}"
}
for seed in 0 1 2; do chain "$seed" "seed=$seed"; done
chain blind seed=0 policy.query=none
R=runs/study/crowd
.venv/bin/python -m src.eval model=tiny_crowd dataset=crowd split=final limit=2000 logger=none threads=1 pruner=attention_dpp \
    pruners=[mmr_attention,scope,question_dpp,vispruner,divprune,cdpruner,random,oracle,oracle_dpp] \
    keep_ratios=[0.1111,0.0556,0.0278] "hydra.run.dir=${R}_rules"
.venv/bin/python -m src.eval model=tiny_crowd dataset=crowd split=final limit=2000 logger=none threads=1 keep_ratios=[0.1111,0.0556,0.0278] "hydra.run.dir=${R}_learned" \
    "runs={tprl: [$C/0, $C/1, $C/2], tprl_lfd: [$C/0/lfd, $C/1/lfd, $C/2/lfd], blind: $C/blind}"
.venv/bin/python experiments/merge.py experiments/crowd ${R}_learned ${R}_rules
