# Sourced by every run.sh: runs live in runs/study, one directory each, and finished ones are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
B=runs/study/base # trained by bases.sh, one directory per seed

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
