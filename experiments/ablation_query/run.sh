#!/usr/bin/env bash
# How much of the question the policy sees; needs bases.sh (all words).
source "$(dirname "$0")/../common.sh"
for query in pooled none; do
    train query_$query experiment=demo policy.query=$query stage.evaluation.limit=50 stage.baselines=[]
done
evaluate ablation_query "tokens: $B/0, pooled: runs/study/query_pooled, none: runs/study/query_none" \
    keep_ratios=[0.3333,0.1111,0.0556,0.0278]
