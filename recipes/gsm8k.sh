#!/usr/bin/env bash
# Your model on GSM8K: MODEL=DIR_OR_HUB_NAME recipes/gsm8k.sh, any causal LM of transformers.
# Machine: one GPU of 80 GB, the hub (pip install datasets). Minutes: not measured, hours; no GPU yet.
# Expected: not measured. What to look at meanwhile: docs/health.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python train_vapo.py --model "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --train openai/gsm8k:main@train --test openai/gsm8k:main@test --prompt_length 512 \
    --prompts 64 --samples 16 --mini_batch 128 --response_length 512 --steps 100 "$@"
