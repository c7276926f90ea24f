"""What keeps a run alive and feeds it fast. Nothing here knows of VAPO.

settings.py      flags: a dataclass a script, its range and help beside each
run.py           a run directory, signals, one clear line when it fails
lora.py          low-rank adapters (optional): what is trained, what leaves
learner.py       one optimiser step: clip, step or skip, schedule
metrics.py       numbers of optimiser steps, summed and averaged
health.py        rules over a run's metrics: what is wrong, since when, what to try
checkpoint.py    save and resume, all or nothing; models as Hugging Face directories
distributed.py   more than one process: torchrun, FSDP2, who does what
loading.py       policies, critics and tokenizers from directories and hub names
slots.py         the sampler: slots that answers enter and leave
generate.py      the same by transformers' generate, the plain reference
vllm_engine.py   the same by vLLM (optional)
equality.py      are these two answers the same? exact, bounded time
math_equality.py the same for general LaTeX, in a process that can be killed (optional)
reward.py        your own reward function: loaded, asked, checked
files.py         problems from JSONL, JSON, CSV and parquet files, and from the hub
truth.py         what is true in the embedded world at every token
base_model.py    a tiny base model for the embedded world
jobs.py          scripts run side by side, one core each
"""
