#!/usr/bin/env bash
# run.sh embedded: every pruner on the embedded LVLM. run.sh geometry [LAYERS] [ROUNDS]: the widths of LLaVA-1.5-7B, random
# weights in float32; 16 layers need 16 GiB and 8 minutes of 2 quiet cores for 4 rounds, 8 layers 10 GiB and 5 minutes for 6.
# run.sh gpu llava|qwen2_5_vl: all layers in bfloat16, on a GPU of 24 GiB or more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
here=experiments/speed/latency
latency() { # NAME OPTION...
    .venv/bin/python -m src.bench latency logger=none "threads=$(nproc)" "keep_ratios=[0.3333,0.1111]" "hydra.run.dir=runs/latency/$1" "${@:2}"
    cp "runs/latency/$1/latency.csv" "$here/$1.csv"
    cp "runs/latency/$1/speedup.svg" "$here/$1.svg"
    cp "runs/latency/$1/latency.md" "$here/$1.md"
}
case "$1" in
embedded)
    latency embedded "pruners=[random,uniform,pooling,cls_attention,hiprune,holov,prumerge,prumerge_plus,visionzip,vispruner,divprune,trim,cdpruner,tome,fastv,pyramiddrop,sparsevlm,dart,mlp,tprl,tprl_adaptive]" \
        latency.repeats="${2:-5}" latency.warmup=1 latency.new_tokens=8
    ;;
geometry)
    layers="${2:-16}"
    latency geometry model=llava model.pretrained=null geometry=llava_1_5_7b model.dtype=float32 \
        "model.geometry.text_config.num_hidden_layers=$layers" "pruners=[divprune,tprl]" latency.batch_sizes=[1] \
        latency.repeats="${3:-4}" latency.warmup=1 latency.new_tokens=2
    ;;
gpu)
    case "$2" in llava) geometry=llava_1_5_7b ;; qwen2_5_vl) geometry=qwen2_5_vl_7b ;; esac
    latency "gpu_$2" "model=$2" model.pretrained=null "geometry=$geometry" \
        "pruners=[random,divprune,vispruner,fastv,dart,tprl]" latency.repeats=20 latency.warmup=3
    .venv/bin/python "$here/schedule.py" "$here/gpu_$2.csv"
    ;;
esac
