"""A real model from a real GGUF file: SmolLM2-135M-Instruct, 98 MB in Q4_1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft_ray.generation.sampler import SamplingParams
from sdft_ray.generation.transformers_sampler import TransformersSampler
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.loading import load_model
from tests.support.real import needs_real_data, real, unpacked
from tests.support.smollm2 import smollm2_gguf

pytestmark = pytest.mark.slow
MIB = 2**20
TABLE_BYTES = 49_152 * 576 * 4
"""The largest tensor, in float32."""

MEASURED = """
import resource, sys
import sdft_ray.importing.importer
from sdft_ray.cli.app import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main_error = None
try:
    main()
except SystemExit as left:
    main_error = left.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(main_error)
"""


@dataclass(frozen=True)
class Run:
    folder: Path
    told: dict[str, object]
    progress: str
    peak_bytes: int
    """Peak resident memory above that of the imported packages."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("import") / "smollm2"
    command = [sys.executable, "-c", MEASURED, "import", str(smollm2_gguf()), str(folder), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    told, peak = done.stdout.strip().splitlines()
    return Run(folder, json.loads(told), done.stderr, 1024 * int(peak))


def test_it_needs_no_more_memory_than_the_model_and_one_tensor(run: Run) -> None:
    weights = Checkpoint.open(run.folder).nbytes
    assert weights == 538_060_032
    mapped = smollm2_gguf().stat().st_size
    assert run.peak_bytes < weights + TABLE_BYTES + mapped + 100 * MIB, "pages of the mapped file count as resident"


def test_it_says_what_was_lost(run: Run) -> None:
    assert run.told["num_parameters"] == 134_515_008
    (note,) = run.told["notes"]  # type: ignore[misc]
    assert "quantized to Q4_1 (210 tensors), Q8_0 (1 tensors)" in note
    assert "quantized to Q4" in (run.folder / "README.md").read_text()
    assert run.progress.count(" ...\n") == len(run.progress.splitlines()), "neither warnings nor bars"


def test_its_logits_are_those_of_transformers_own_reader(run: Run) -> None:
    path = smollm2_gguf()
    direct = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    ids_BT = torch.arange(64)[None] * 701 % 49_152
    with torch.inference_mode():
        expected = direct(input_ids=ids_BT).logits
        stock = AutoModelForCausalLM.from_pretrained(run.folder)
        assert stock.dtype == torch.float32
        assert torch.equal(stock(input_ids=ids_BT).logits, expected)


def test_it_answers(run: Run) -> None:
    Checkpoint.open(run.folder).check_expected()
    model, tokenizer = load_model(run.folder, "float32"), AutoTokenizer.from_pretrained(run.folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]  # type: ignore[operator]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>", "and it stops"


@needs_real_data
def test_its_tokenizer_is_the_one_that_was_read_before(run: Run, tmp_path: Path) -> None:
    known = AutoTokenizer.from_pretrained(unpacked("smollm2-135m-instruct", tmp_path))
    ours = AutoTokenizer.from_pretrained(run.folder)
    assert ours.get_vocab() == known.get_vocab()
    for text in (
        "What is the capital of France?",
        "  x = 1\n\tif x:  # 12,345 é 日本",
        "<|im_start|>user\nHi<|im_end|>",
    ):
        assert ours(text)["input_ids"] == known(text)["input_ids"]
    assert ours.chat_template == known.chat_template


@needs_real_data
@pytest.mark.parametrize("is_special", [True, False])
def test_the_end_of_turn_stops_whatever_the_tokenizer_calls_its_end(run: Run, tmp_path: Path, is_special: bool) -> None:
    """As published models have it: a ChatML template, and a tokenizer whose only EOS is the end of a text."""
    for path in run.folder.iterdir():
        if path.name not in ("generation_config.json", "tokenizer_config.json"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(
        real("cases", "templates", "chatml_eos_endoftext.tokenizer_config.json"), tmp_path / "tokenizer_config.json"
    )
    tokens = json.loads((run.folder / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["special"] = token["special"] and (is_special or token["content"] != "<|im_end|>")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    config = json.loads((run.folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    sampler = TransformersSampler(tmp_path, dtype="float32")
    try:
        sampled = sampler.submit("What is the capital of France?", SamplingParams(max_tokens=40), 0).result()
    finally:
        sampler.close()
    assert (sampled.text, sampled.finish_reason) == ("The capital of France is Paris.", "stop")
    assert sampler.stop_ids == {0, 2}
