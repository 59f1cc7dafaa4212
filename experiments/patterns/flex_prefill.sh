#!/usr/bin/env bash
# RULER under the pattern flex_prefill, 4k to 128k tokens; the same folder for every pattern, so that
# the plots compare them. Further options go to `flexprefill eval` (docs/eval.md): --chat-template for
# models that chat, --length for those with a shorter context.
#   experiments/patterns/flex_prefill.sh MODEL_FOLDER [RESULTS_FOLDER [OPTION...]]
set -euo pipefail
model=${1:?the folder of a Hugging Face model}
out=${2:-results/$(basename "$model")}
flexprefill eval --model "$model" --out "$out" --suite ruler --pattern flex_prefill \
  --length 4k 8k 16k 32k 64k 128k --samples 100 "${@:3}"
