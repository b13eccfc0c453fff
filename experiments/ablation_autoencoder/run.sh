#!/usr/bin/env bash
# How wide the codes of the tokens must be; needs bases.sh (width 64).
source "$(dirname "$0")/../common.sh"
for width in 0 16; do
    train code_$width experiment=demo policy.code_width=$width stage.evaluation.limit=50 stage.baselines=[]
done
evaluate ablation_autoencoder "code_64: $B/0, code_16: runs/study/code_16, code_none: runs/study/code_0" \
    keep_ratios=[0.3333,0.1111,0.0556]
