"""Train the laboratory's teacher from scratch: a Llama with 12 blocks and 2.4 million parameters.

    train_teacher(Path("teacher"), report=lambda record: ...)

On a CPU it runs in several processes with one thread each. They synchronize once per step; threads synchronize
at every operation, which takes most of the time on a busy machine.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdft_ray.data.packing import PackedRows, pack
from sdft_ray.errors import ResourceError
from sdft_ray.lab import mixture, sets
from sdft_ray.lab.documents import documents
from sdft_ray.lab.export import RECORD
from sdft_ray.lab.tokenizer import BEGIN, END, VOCAB_SIZE, build_tokenizer
from sdft_ray.training.loop import train
from sdft_ray.training.parallel import ReplicatedParallel, Single, local_group
from sdft_ray.training.plan import StepRecord, TrainPlan, TrainSummary

CONTEXT_TOKENS = 512
ROW_TOKENS = 256
TIMED_STEPS = 50
"""Number of steps after which the total training time is estimated."""


@dataclass(frozen=True)
class TeacherRecipe:
    """Hyperparameters of the teacher; the training texts are defined in `sdft_ray.lab.mixture`."""

    num_tokens: int = 15_500_000
    rows_per_step: int = 16
    muon_learning_rate: float = 0.012
    adamw_learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.525
    initializer_range: float = 0.04
    seed: int = 0

    def plan(self, num_rows: int) -> TrainPlan:
        """One pass over all rows."""
        return TrainPlan(
            num_steps=max(1, num_rows // self.rows_per_step),
            rows_per_step=self.rows_per_step,
            learning_rate=self.muon_learning_rate,
            adamw_learning_rate=self.adamw_learning_rate,
            optimizer="muon",
            schedule="wsd",
            warmup_fraction=self.warmup_fraction,
            decay_fraction=self.decay_fraction,
            weight_decay=self.weight_decay,
            precision="bf16",
            seed=self.seed,
        )


def train_teacher(
    directory: Path,
    *,
    num_threads: int = 2,
    max_minutes: float = 45.0,
    report: Callable[[StepRecord], None] | None = None,
    inspect: Callable[[StepRecord, LlamaForCausalLM], None] | None = None,
    recipe: TeacherRecipe | None = None,
    compiled: bool | None = None,
) -> dict[str, Any]:
    """Train a teacher, save it in `directory` as a Hugging Face checkpoint, and return its training record.

    After every step, `report` gets its record, and `inspect` the record and the current model. `compiled` compiles
    the blocks (None: if there is a C++ compiler), which saves a third of the time. `num_threads` processes share each
    step. Raises `ResourceError` after `TIMED_STEPS` steps if training would take longer than `max_minutes`. The result
    depends on the recipe and, by rounding, on `num_threads`.
    """
    recipe = recipe or TeacherRecipe()
    started = time.perf_counter()
    tokenizer = build_tokenizer(mixture.tokenizer_texts(), context=CONTEXT_TOKENS)
    rows = pack(
        documents(
            tokenizer,
            num_tokens=recipe.num_tokens,
            longest=ROW_TOKENS,
            seed=f"sdft_ray.lab teacher {recipe.seed}",
            reserved=sets.reserved_questions(),
        ),
        ROW_TOKENS,
    )
    plan = recipe.plan(rows.num_rows)
    compiled = has_compiler() if compiled is None else compiled
    model = build_teacher(tokenizer, recipe)
    if compiled:
        model.model.compile()
    seconds_left = max_minutes * 60 - (time.perf_counter() - started)
    with ExitStack() as stack:
        if num_threads > 1:
            stack.enter_context(_helpers(rows, recipe, num_threads, tokenizer, compiled))
        summary = train(
            model,
            rows,
            plan,
            parallel=ReplicatedParallel() if num_threads > 1 else Single(),
            report=_watched(report, inspect, model, plan.num_steps, seconds_left),
        )
    record = _record(recipe, plan, rows, summary, num_threads, time.perf_counter() - started)
    save_teacher(model, tokenizer, Path(directory), record)
    return record


def has_compiler() -> bool:
    """Whether torch can compile for the CPU here: it needs a C++ compiler."""
    return shutil.which("clang++" if sys.platform == "darwin" else "g++") is not None


def build_teacher(tokenizer: PreTrainedTokenizerFast, recipe: TeacherRecipe) -> LlamaForCausalLM:
    """The untrained model. Outputs to the residual stream start smaller, by 1/sqrt(2 x blocks) (GPT-2)."""
    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=recipe.initializer_range,
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def save_teacher(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path, record: dict[str, Any]
) -> None:
    """Write bfloat16 weights, tokenizer, chat template, generation config and the training record."""
    directory.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _watched(
    report: Callable[[StepRecord], None] | None,
    inspect: Callable[[StepRecord, LlamaForCausalLM], None] | None,
    model: LlamaForCausalLM,
    num_steps: int,
    seconds_left: float,
) -> Callable[[StepRecord], None]:
    spent: list[float] = []

    def watch(record: StepRecord) -> None:
        if report is not None:
            report(record)
        if inspect is not None:
            inspect(record, model)
        spent.append(record.wall_s)
        needed = statistics.median(spent) * num_steps  # the first step may have compiled the model
        if len(spent) == TIMED_STEPS and needed > seconds_left:
            raise ResourceError(
                f"training would take {needed / 60:.0f} minutes, more than the {seconds_left / 60:.0f} left",
                "stop other programs, or allow more minutes",
            )

    return watch


@contextmanager
def _helpers(
    rows: PackedRows,
    recipe: TeacherRecipe,
    num_processes: int,
    tokenizer: PreTrainedTokenizerFast,
    compiled: bool,
) -> Iterator[None]:
    """A process group: this process (rank 0), and `num_processes - 1` others that run the same training."""
    spawn = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="sdft-lab-") as folder:
        shared = Path(folder)
        rows.save(shared / "rows.arrow")
        tokenizer.save_pretrained(shared / "tokenizer")
        others = [
            spawn.Process(target=_help, args=(rank, num_processes, shared, recipe, compiled), daemon=True)
            for rank in range(1, num_processes)
        ]
        for other in others:
            other.start()
        torch.set_num_threads(1)
        try:
            with local_group(0, num_processes, shared):
                yield
                for other in others:
                    other.join()
        finally:
            torch.set_num_threads(threads)
            for other in others:
                other.terminate()
                other.join()


def _help(rank: int, num_processes: int, place: Path, recipe: TeacherRecipe, compiled: bool) -> None:
    torch.set_num_threads(1)
    rows = PackedRows.load(place / "rows.arrow")
    model = build_teacher(PreTrainedTokenizerFast.from_pretrained(place / "tokenizer"), recipe)
    if compiled:
        model.model.compile()
    with local_group(rank, num_processes, place) as parallel:
        train(model, rows, recipe.plan(rows.num_rows), parallel=parallel)


def _record(
    recipe: TeacherRecipe,
    plan: TrainPlan,
    rows: PackedRows,
    summary: TrainSummary,
    num_threads: int,
    wall_s: float,
) -> dict[str, Any]:
    """The training record. `gates` is empty; `record_gates` fills it in."""
    return {
        "recipe": asdict(recipe),
        "plan": plan.identity(),
        "mixture": {
            "families": mixture.FAMILY_SHARES,
            "human": mixture.HUMAN_SHARE,
            "rewriting": mixture.REWRITE_SHARE,
            "exam": mixture.EXAM_SHARE,
            "exam_rewriting": mixture.EXAM_REWRITE_SHARE,
            "other_voice": mixture.OTHER_VOICE_SHARE,
        },
        "num_documents": sum(int(segments.max()) for segments in rows.segment_ids_NT),
        "num_tokens": summary.num_tokens,
        "num_loss_tokens": summary.num_loss_tokens,
        "final_loss": round(summary.loss, 5),
        "num_processes": num_threads,
        "wall_s": round(wall_s, 1),
        "tokens_per_s": round(summary.tokens_per_s),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "gates": [],
    }
