#!/usr/bin/env bash
# Every pruner on 5,000 test questions at six keep ratios; needs bases.sh.
source "$(dirname "$0")/../common.sh"
R=runs/study/main_table
F=${B}_former
five() { # BASE [/STAGE]
    local stage=${2:-}
    echo "[$1/0$stage, $1/1$stage, $1/2$stage, $1/3$stage, $1/4$stage]"
}
evaluate main_table "tprl: $(five $B), tprl_lfd: $(five $B /lfd), attention_start: $(five $F), attention_start_lfd: $(five $F /lfd), mlp: $F/0/mlp" \
    limit=5000 keep_ratios=[0.5,0.3333,0.2222,0.1111,0.0556,0.0278] \
    pruners=[random,uniform,pooling,cls_attention,vispruner,divprune,attention_dpp,mmr_attention,scope,question_dpp,attention_words,attention_color,word_attention,keyword_color,keyword_budget,oracle,oracle_dpp]
more() {
    .venv/bin/python -m src.eval logger=none split=final limit=5000 pruner=divprune "pruners=[$2]" "keep_ratios=[$3]" "hydra.run.dir=${R}_$1"
}
for seed in 0 1 2; do # the learned rivals: as many token passes
    train "selector_$seed" stage=distill policy=selector stage.iterations=150 'stage.keep_ratio=[0.3333,0.2222,0.1111,0.0556,0.0278]' \
        'stage.served.keep_ratios=[0.1111,0.0556,0.0278]' threads=1 "seed=$seed"
done
rivals() { # NAME OPTION...
    .venv/bin/python -m src.eval logger=none split=final limit=5000 keep_ratios=[0.5,0.3333,0.2222,0.1111,0.0556,0.0278] \
        "hydra.run.dir=${R}_$1" "${@:2}"
}
S=runs/study/selector
rivals selector "runs={selector: [${S}_0, ${S}_1, ${S}_2]}" 'pruners=[resize]'
for seed in 0 1 2; do rivals "mmr_$seed" pruner=scorer_mmr "pruner.pretrained=${S}_$seed" model=tiny_llava dataset=scenes; done
BEFORE=visionzip,cdpruner,prumerge,prumerge_plus,trim,holov,hiprune
more low $BEFORE 0.1111,0.0556
more mid $BEFORE 0.3333,0.2222
more high $BEFORE,fastv,pyramiddrop,dart 0.5
more layers fastv,pyramiddrop,dart 0.3333,0.2222
more sparse sparsevlm 0.5,0.3333,0.2222
more tome tome 0.5,0.3333,0.2222,0.1111,0.0556
rivals keyword pruner=keyword_budget pruner.base=attention_words model=tiny_llava dataset=scenes 'keep_ratios=[0.3333,0.2222,0.1111,0.0556]'
.venv/bin/python experiments/merge.py experiments/main_table $R ${R}_low ${R}_mid ${R}_high ${R}_layers ${R}_sparse ${R}_tome \
    ${R}_selector ${R}_mmr_0@0 ${R}_mmr_1@1 ${R}_mmr_2@2 ${R}_keyword
