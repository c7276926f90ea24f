#!/usr/bin/env bash
# The paper's run: Qwen2.5-32B, 512 x 16 answers a rollout. Start it on each of eight nodes with the
# same HOST; --out must be a directory that all of them can write.
# Machine: eight nodes of eight GPUs of 80 GB, vLLM: at most 75.4 GB each by `python -m lab.plan`.
# Minutes: days; no GPU yet. Expected: the paper has 60 on AIME 2024, avg@32 at top-p 0.7; not run.
set -euo pipefail
cd "$(dirname "$0")/.."
export VAPO_RANK_MINUTES=1440
torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "${HOST:-localhost}:29500" \
    train_vapo.py --model "${MODEL:-Qwen/Qwen2.5-32B}" --out "${OUT:-/shared/runs/32b}" \
    --train "${TRAIN:-BytedTsinghua-SIA/DAPO-Math-17k:default@train}" --test "${TEST:-BytedTsinghua-SIA/AIME-2024:default@train}" \
    --prompts 512 --mini_batch 512 --response_length 20480 --steps 312 --gradient_checkpointing \
    --engine vllm --tensor_parallel 8 --eval_samples 32 --eval_top_p 0.7 "$@"
