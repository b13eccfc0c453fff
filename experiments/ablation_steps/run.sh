#!/usr/bin/env bash
# Pruning steps per episode at equal LVLM evaluations; needs bases.sh (one step).
source "$(dirname "$0")/../common.sh"
train steps_3 stage=ppo stage.init_from=$B/0/lfd stage.steps=3 stage.prompts=8
evaluate ablation_steps "steps_1: $B/0, steps_3: runs/study/steps_3" keep_ratios=[0.3333,0.1111,0.0556]
