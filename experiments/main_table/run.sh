#!/usr/bin/env bash
# Every pruner on 5,000 test questions at five keep ratios; needs bases.sh.
source "$(dirname "$0")/../common.sh"
evaluate main_table "tprl: [$B/0, $B/1, $B/2], tprl_lfd: [$B/0/lfd, $B/1/lfd, $B/2/lfd], mlp: $B/0/mlp" limit=5000 \
    keep_ratios=[0.5,0.3333,0.2222,0.1111,0.0556] \
    pruners=[random,uniform,pooling,cls_attention,vispruner,divprune,oracle]
