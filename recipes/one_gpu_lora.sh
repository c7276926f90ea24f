#!/usr/bin/env bash
# A 7B model on one GPU, with adapters on policy and critic (--lora, docs/gpus.md). LoRA wants some
# ten times the learning rate.
# Machine: one GPU of 80 GB by `python -m lab.plan`, the hub (pip install datasets peft).
# Minutes: not measured, hours; no GPU yet. Expected: not measured.
set -euo pipefail
cd "$(dirname "$0")/.."
python train_vapo.py --model "${MODEL:-Qwen/Qwen2.5-7B-Instruct}" --lora 16 --lr 1e-5 --critic_lr 2e-5 \
    --pretrain_lr 2e-5 --train openai/gsm8k:main@train --test openai/gsm8k:main@test \
    --prompt_length 512 --prompts 64 --samples 16 --mini_batch 128 --response_length 1024 --steps 100 \
    --sample_rows 128 --micro_batch_tokens 8192 --gradient_checkpointing "$@"
