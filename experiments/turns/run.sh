#!/usr/bin/env bash
# Several questions about one image: who keeps what from turn to turn, at equal tokens.
#   IMAGES=100 experiments/turns/run.sh
#   IMAGES=2 ITERATIONS=1 EXTRA=stage.served.limit=8 experiments/turns/run.sh     # does it run?
source "$(dirname "$0")/../common.sh"
IMAGES=${IMAGES:-100}
ITERATIONS=${ITERATIONS:-40}
EXTRA=${EXTRA:-} # further options of the training
T=runs/study/turns
crowd='model=tiny_crowd dataset=crowd'

# The policy that ships, made to share a core: 4 questions per image.
train turns/trained stage=turns $crowd stage.init_from=tprl_tiny_crowd stage.iterations="$ITERATIONS" stage.lr_actor=3e-4 \
    stage.validate_every=10 stage.served.limit=200 threads=1 $EXTRA

ask() { # NAME OPTION...: 12 questions per image, of which each conversation asks 2, 4 or 8
    [ -f "$T/$1/done.json" ] || .venv/bin/python -m src.eval mode=turns $crowd dataset.rounds=2 split=final limit=$((12 * IMAGES)) \
        'turns.lengths=[2,4,8]' 'keep_ratios=[0.0556]' logger=none threads=1 "hydra.run.dir=$T/$1" "${@:2}"
    cp "$T/$1/turns.csv" "experiments/turns/$1.csv"
}
ask rules pruner=core_focus 'runs={tprl: tprl_tiny_crowd}' 'pruners=[word_attention,attention_dpp]'
ask saliency pruner=core_focus 'pruners=[attention_words]'
ask color pruner=core_focus pruner.focus=keyword_color 'pruners=[keyword_color]'
ask policy pruner=core_focus pruner.core=tprl_tiny_crowd pruner.focus=tprl_tiny_crowd "runs={tprl: tprl_tiny_crowd, trained: $T/trained}"
IMAGES=$((IMAGES / 2))
ask raster pruner=core_focus pruner.core_first=false 'pruners=[core_focus]'
