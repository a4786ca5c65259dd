"""Stock engines, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DECODE = """
import json, sys
from vllm import LLM, SamplingParams

prompt, new_tokens, *directories = json.loads(sys.argv[1])
params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
for directory in directories:
    model = LLM(directory, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**24, max_model_len=64)
    done = model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    print("TOKENS", json.dumps(list(done[0].outputs[0].token_ids)), flush=True)
    del model
"""


def decoded_by_vllm(directories: Sequence[Path], prompt: Sequence[int], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of each checkpoint, one engine after the other."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _DECODE, json.dumps([list(prompt), new_tokens, *map(str, directories)])],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert len(lines) == len(directories), done.stderr[-2000:]
    return [json.loads(line.removeprefix("TOKENS ")) for line in lines]
