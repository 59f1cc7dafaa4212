#!/usr/bin/env bash
# RULER under the pattern minfer, 4k to 128k tokens; the same folder for every pattern, so that
# the plots compare them. Further options go to `flexprefill eval` (docs/eval.md): --chat-template for
# models that chat, --length for those with a shorter context.
# The per-head patterns are those that 'flexprefill calibrate --model MODEL_FOLDER --out FILE.json' found.
#   experiments/patterns/minfer.sh MODEL_FOLDER FILE.json [RESULTS_FOLDER [OPTION...]]
set -euo pipefail
model=${1:?the folder of a Hugging Face model}
file=${2:?the per-head patterns: flexprefill calibrate --model MODEL_FOLDER --out FILE.json}
out=${3:-results/$(basename "$model")}
flexprefill eval --model "$model" --out "$out" --suite ruler --pattern minfer \
  --config "{\"path\": \"$(realpath "$file")\"}" \
  --length 4k 8k 16k 32k 64k 128k --samples 100 "${@:4}"
