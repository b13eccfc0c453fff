#!/usr/bin/env bash
# The language model tuned under pruning, against the frozen one and against the same LoRA without pruning. Resumable: what is finished is
# not repeated, and a run that was killed goes on from its last checkpoint.
#   SEEDS="0 1 2" ITERATIONS=600 LIMIT=2000 experiments/tune/run.sh
#   ARMS=alternating PPO=20 experiments/tune/run.sh     # two rounds of PPO and tune, with half of the tune steps in each
#   ARMS="mixed control" ITERATIONS=2 LIMIT=12 EXTRA=stage.served.limit=8 experiments/tune/run.sh     # does it run?
source "$(dirname "$0")/../common.sh"
SEEDS=${SEEDS:-0}
ITERATIONS=${ITERATIONS:-600}
LIMIT=${LIMIT:-2000}
ARMS=${ARMS:-mixed 0.1111 0.0556 0.0278 own control}
EXTRA=${EXTRA:-} # further options of the trainings
PPO=${PPO:-20}   # iterations in each round of `alternating`
TURNS=${TURNS:-} # further options of `alternating`
T=${T:-runs/study/tune}
P='pruner=tprl pruner.pretrained=tprl_tiny_crowd'
crowd='model=tiny_crowd dataset=crowd logger=csv threads=1'

tune() { # NAME OPTION...
    local run=$T/$1
    [ -f "$run/done.json" ] && return
    if [ -f "$run/last.ckpt" ] || [ -f "$run/parts.ckpt" ]; then
        .venv/bin/python -m src.train resume="$run"
    elif [[ $1 == alternating_* ]]; then # what is said of stage=tune is said of the tune in the chain
        .venv/bin/python -m src.train stage=alternate $crowd stage.init_from=tprl_tiny_crowd stage.ppo.iterations="$PPO" \
            stage.tune.iterations=$((ITERATIONS / 2)) stage.evaluation.limit=100 'stage.evaluation.pruners=[]' \
            ${EXTRA//stage./stage.tune.} $TURNS "hydra.run.dir=$run" "${@:2}"
    else
        .venv/bin/python -m src.train stage=tune $crowd stage.iterations="$ITERATIONS" $EXTRA "hydra.run.dir=$run" "${@:2}"
    fi
}
look() { # NAME OPTION...: pruned at three ratios, and with all tokens
    [ -f "$T/eval_$1/done.json" ] || .venv/bin/python -m src.eval $crowd logger=none split=final limit="$LIMIT" \
        'keep_ratios=[0.1111,0.0556,0.0278]' $P 'pruners=[attention_words]' "hydra.run.dir=$T/eval_$1" "${@:2}"
}

options() { # ARM: what it is trained with
    case $1 in
        mixed) echo "$P" ;;                                  # one adapter for the three ratios
        own) echo "$P stage.answers=own" ;;                  # no labels
        control) echo "pruner=keep_all" ;;                   # the same LoRA, nothing pruned
        alternating) ;;                                      # the pruner learns too, on the model as it is tuned by then
        *) echo "$P stage.keep_ratio=$1" ;;
    esac
}
for seed in $SEEDS; do
    for arm in $ARMS; do tune "${arm}_$seed" seed="$seed" $(options "$arm"); done
done
look frozen
for seed in $SEEDS; do
    for arm in $ARMS; do
        own=()
        [ "$arm" = alternating ] && own=(pruner.pretrained="$T/${arm}_$seed")
        look "${arm}_$seed" model.adapter="$T/${arm}_$seed" "${own[@]}"
    done
done
.venv/bin/python experiments/tune/table.py $T experiments/tune
