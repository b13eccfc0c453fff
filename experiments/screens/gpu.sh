#!/usr/bin/env bash
# tiny_screens in one lease of a GPU: 10 minutes a command, 64 MiB of working tree in all, files of at most 16 MiB back.
#
#   here   gpu.sh pack <train folder>    # runs/screens_gpu/<n>/part-<n>.tar, of at most MIB (20) MiB each, about 1,700 pages
#   there  gpu.sh unpack                 # carry runs/screens_gpu/0; with one part left this call is not needed
#   there  gpu.sh train                  # carry the next part in the same lease; writes to $OUT
#   here   gpu.sh join <files> <folder>  # puts model.tar.* together again: <folder>/model
#
# `train` takes MINUTES (7.5) of the clock, TOWER (0.5) of them for the tower, and then up to 90 seconds for export and gates.
# More words go to the training, such as --tower-batch 32. A second `train` of the same lease and words goes on where the first stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
PARTS=${PARTS:-runs/screens_gpu} PLACE=${PLACE:-/tmp/screens} PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda}
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

case "${1:-}" in
pack)
  "$PYTHON" experiments/screens/travel.py pack "$2" "$PARTS" --mib "${MIB:-20}"
  ;;
unpack)
  "$PYTHON" experiments/screens/travel.py unpack "$PARTS" "$PLACE/pages"
  wc -l "$PLACE/pages/elements.jsonl"
  ;;
train)
  shift
  "$0" unpack
  run=$PLACE/run
  # A training that fails or is stopped still leaves what it has learned: export follows in any case.
  code=0
  "$PYTHON" -W ignore -m experiments.screens.tiny.train --device "$DEVICE" --pages "$PLACE/pages" --out "$run" \
    --minutes "${MINUTES:-7.5}" --tower-share "${TOWER:-0.5}" --every 2 --tower-batch 64 --reader-batch 64 "$@" || code=$?
  cp "$run"/log.jsonl "$run"/plan.json "$OUT"/
  "$PYTHON" -W ignore -m experiments.screens.tiny.train --pages "$PLACE/pages" --out "$run" --export "$run/model" \
    --minutes "${MINUTES:-7.5}" --tower-share "${TOWER:-0.5}" --tower-batch 64 --reader-batch 64 "$@"
  tar c -C "$run" model | split -b 15M -d - "$OUT/model.tar."
  timeout 60 "$PYTHON" -W ignore -m experiments.screens.tiny.gates "$run/model" --split val --batch 64 | tee "$OUT/gates.txt" \
    || echo "the gates were not read: experiments.screens.tiny.gates on the model that came back"
  ls -l "$OUT"
  exit "$code"
  ;;
join)
  mkdir -p "$3"
  cat "$2"/model.tar.* | tar x -C "$3"
  ;;
*)
  sed -n '2,10p' "$0"
  exit 2
  ;;
esac
