# Sourced by every run.sh: runs live in runs/study, one directory each, and finished ones are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
B=runs/study/base # trained by bases.sh, one directory per seed

# The recipe of before 4d4676a: demonstrations that never read the question (options of a chain).
FORMER=(pruner=attention_dpp stage.lfd.module.demonstrations=2500 stage.lfd.module.epochs=3 stage.lfd.module.lr=5e-4
    'stage.lfd.module.keep_ratio=[0.3333,0.2222,0.1111,0.0556]' 'stage.lfd.served.keep_ratios=[0.3333,0.1111]'
    stage.ppo.module.iterations=200 stage.ppo.module.lr_actor=1e-3)

# That of `crowd`, for a demonstrator that reads the question.
QUESTION=(stage.lfd.module.demonstrations=10000 stage.lfd.module.epochs=4 stage.lfd.module.lr=2e-3
    'stage.lfd.module.keep_ratio=[0.2222,0.1111,0.0556,0.0278]' 'stage.lfd.served.keep_ratios=[0.1111,0.0556,0.0278]'
    stage.ppo.module.iterations=120 stage.ppo.module.lr_actor=3e-4)

# train NAME OPTION...: a sweep of one, because sweeps skip what is finished and refuse other settings under its name
train() {
    .venv/bin/python -m src.train -m "${@:2}" logger=csv hydra.sweep.dir=runs/study "hydra.sweep.subdir=$1"
}

# evaluate STUDY ARMS OPTION...: the numbers and the plot of a study, on test questions that nothing else reads
evaluate() {
    .venv/bin/python -m src.eval logger=none split=final limit=1000 seeds=[0,1,2,3,4] "hydra.run.dir=runs/study/$1" \
        "runs={$2}" "${@:3}"
    cp "runs/study/$1"/{results.csv,intervals.csv,paired.json,spreads.json,pareto.svg,scores.npz} "experiments/$1/"
}
