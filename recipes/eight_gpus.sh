#!/usr/bin/env bash
# 7B with the paper's batch and answers of at most 20,480 tokens: MODEL, TRAIN, TEST name your own.
# Machine: eight GPUs of 80 GB: at most 69 GB each by `python -m lab.plan`. Minutes: days; no GPU yet.
# Expected: not measured. The paper's is of 32B: recipes/cluster.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export VAPO_RANK_MINUTES=1440
torchrun --nproc_per_node 8 train_vapo.py --model "${MODEL:-Qwen/Qwen2.5-7B}" \
    --train "${TRAIN:-BytedTsinghua-SIA/DAPO-Math-17k:default@train}" --test "${TEST:-BytedTsinghua-SIA/AIME-2024:default@train}" \
    --prompts 512 --mini_batch 512 --response_length 20480 --steps 312 --gradient_checkpointing --sample_rows 16 "$@"
