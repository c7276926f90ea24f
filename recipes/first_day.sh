#!/usr/bin/env bash
# A GPU's first day: all that can be tried on one, unattended. What fails is noted, and the day goes
# on. A page, README.md, and a log a step are in runs/first_day.
# Machine: one GPU, or several of one machine. Minutes: about 10, by estimate; no GPU yet.
# Expected: "failed: nothing" in the last line. In small, on a CPU: recipes/first_day.sh cpu [OUT]
set -u
cd "$(dirname "$0")/.."
device=${1:-cuda} out=${2:-runs/first_day} failed=""
mkdir -p "$(dirname "$out")" && mkdir "$out" || exit 2
small="--steps 2 --prompts 8 --samples 8 --mini_batch 16 --pretrain_answers 128 --pretrain_passes 1 --eval_samples 2"
main="" large="--prompts 16 --samples 16 --response_length 512" tests="-k cuda"
gpus=$(python -c "import torch; print(torch.cuda.device_count() or 2)")
if [ "$device" = cpu ]; then
    main=$small large="--prompts 2 --samples 4 --response_length 16 --mini_batch 4" tests="tests/test_gae.py"
fi

step() {  # NAME COMMAND ...
    local name=$1 found=ok started=$SECONDS; shift
    echo "$name ..."
    "$@" > "$out/$name.log" 2>&1 || { found="**failed**, see $name.log"; failed="$failed $name"; }
    echo "| $name | $found | $((SECONDS - started)) |" >> "$out/README.md"
}
vapo() {  # NAME FLAGS ...
    step "$1" python train_vapo.py --device "$device" --out "$out/run-$1" "${@:2}"
}

printf '# First day\n\n| step | | seconds |\n|---|---|---|\n' > "$out/README.md"
step tests python -m pytest -q --no-header $tests
vapo main_command $main
for preset in vapo vc_ppo ppo grpo; do vapo "$preset" $small --preset "$preset"; done
vapo dapo $small --preset dapo --dynamic_sampling 100
vapo compiled $small --compile=True
vapo eager $small --compile=False
vapo bfloat16 $small --dtype bfloat16
step FSDP2 torchrun --standalone --nproc_per_node "$gpus" train_vapo.py --device "$device" --out "$out/run-FSDP2" $small
step bench_toy python -m lab.bench --parts sampling update --repeats 2 --device "$device" --json "$out/bench_toy.json"
step large_model python - "$device" "$out" <<'END'
import sys, transformers
from system import loading
device, out = sys.argv[1:]
tokenizer = loading.load_tokenizer("runs/toy/base")
sizes = (1000, 64, 128, 2, 2, 1) if device == "cpu" else (151_936, 896, 4864, 24, 14, 2)  # half a billion
names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads")
ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
config = transformers.Qwen2Config(**dict(zip(names, sizes)), **ends)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(f"{out}/model")
tokenizer.save_pretrained(f"{out}/model")
END
step bench_large python -m lab.bench --parts sampling update --repeats 2 @runs/toy/train_vapo.args --device "$device" \
    --model "$out/model" --micro_batch_tokens 16384 $large --json "$out/bench_large.json"
python - "$out" >> "$out/README.md" <<'END'
import json, pathlib, sys
from system import run
out = pathlib.Path(sys.argv[1])
look = ("test_accuracy", "sampler_gap", "importance", "ratio_max", "sample_tokens_per_second", "train_tokens_per_second")
print(f"\n`{run.describe(run.pick_device('auto'))}`\n")
for path in sorted(out.glob("run-*/metrics.jsonl")):
    last = json.loads(path.read_text().splitlines()[-1])
    print(f"- {path.parent.name}:", ", ".join(f"{n} {last[n]:.4g}" for n in look if last.get(n) is not None))
for path in sorted(out.glob("bench_*.json")):
    found = json.loads(path.read_text())
    print(f"- {path.stem}:", *(f"{line['part']}: {line['ours']:.0f} tok/s," for line in found["lines"]), found["shares"])
END
printf '\nFailed:%s.\n' "${failed:- nothing}" >> "$out/README.md"
echo "$out/README.md"
echo "failed:${failed:- nothing}"
