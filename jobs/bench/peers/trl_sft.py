"""Tokens per second of TRL's SFTTrainer with packing, in steps that are under way.

    python jobs/bench/peers/trl_sft.py JOB.json

Stands alone: it runs in an environment of peers, without `sdft_ray`. The job holds tokenized documents (`input_ids`,
`labels`), the model's config, a directory with a tokenizer, and the settings below. The last line is one JSON object.

Best-fit-decreasing packing lays the rows of a micro-batch one after another, without padding, into a single sequence.
Only kernels for variable lengths skip what lies between documents; on a CPU attention is computed over the whole
sequence and masked by document, so its cost grows with the square of rows times length.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.sched_setaffinity(0, {job["core"]})
    print(json.dumps(measure(job)))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(**job["config"])
    config._attn_implementation = job["attention"]
    marks: list[tuple[float, float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            # Documents lie without padding, so every token that the trainer counts is one of a document.
            marks.append((time.perf_counter(), time.process_time(), trainer._total_train_tokens))

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=LlamaForCausalLM(config),
            args=arguments(job, folder),
            train_dataset=Dataset.from_dict(job["documents"]),
            processing_class=AutoTokenizer.from_pretrained(job["tokenizer"]),
            callbacks=[Clock()],
        )
        history = trainer.train()
    (wall, cpu, tokens), (wall_end, cpu_end, tokens_end) = marks[job["warmup_steps"] - 1], marks[-1]
    return {
        "tokens_per_s": (tokens_end - tokens) / (wall_end - wall),
        "tokens_per_cpu_s": (tokens_end - tokens) / (cpu_end - cpu),
        "num_tokens": tokens_end - tokens,
        "loss": history.training_loss,
        "version": trl.__version__,
    }


def arguments(job: dict[str, Any], folder: str) -> Any:
    """What is not named keeps TRL's default: packing best-fit decreasing, fused AdamW."""
    from trl import SFTConfig  # pyright: ignore[reportMissingImports]

    return SFTConfig(
        output_dir=folder,
        use_cpu=True,
        packing=True,
        max_length=job["row_tokens"],
        per_device_train_batch_size=job["micro_batch_rows"],
        gradient_accumulation_steps=job["rows_per_step"] // job["micro_batch_rows"],
        max_steps=job["num_steps"],
        bf16=job["precision"] == "bf16",
        gradient_checkpointing=False,  # on by default, to save memory; the others do without
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        dataloader_num_workers=0,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
