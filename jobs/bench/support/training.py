"""What the training benchmark trains: documents of the laboratory, a random Llama, and a bare loop to compare with.

Suffixes: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.packing import Document, PackedRows, attention_inputs
from sdft_ray.lab import sets
from sdft_ray.lab.export import TEACHER
from sdft_ray.models.loading import load_model
from sdft_ray.training.loop import rows_of_step, train
from sdft_ray.training.parallel import Parallel, local_group
from sdft_ray.training.plan import StepRecord, TrainPlan
from sdft_ray.training.schedule import Precision

MODEL: dict[str, Any] = {
    "vocab_size": 1200,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""The laboratory teacher's vocabulary and depth, twice as wide: 9.4 million parameters."""

ROWS_PER_STEP = 8
LEARNING_RATE = 3e-4
WARMUP_STEPS = 1
"""Steps that are not timed: libraries load what they need."""

_IGNORED = -100


def documents(tokenizer: Path | None = None) -> list[Document]:
    """The laboratory's mixed seed set with its reference responses, as training sees it."""
    chat = ChatFormat(load_tokenizer(tokenizer or TEACHER))
    return [chat.encode(row["instruction"], row["reference"]) for row in sets.seed_rows("mixed")]


def make_model(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**MODEL)
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Trainee:
    """A model to train, by a function of its attention, and the rows of a step, which are one micro-batch."""

    make: Callable[[str], Any] = make_model
    rows_per_step: int = ROWS_PER_STEP


def trainee_of(model: Path | None, num_rows: int) -> Trainee:
    """A checkpoint in float32, or the random Llama."""
    return (
        Trainee()
        if model is None
        else Trainee(lambda attention: load_model(model, "float32", attn=attention), num_rows)
    )


@dataclass
class Clock:
    """Time, tokens of documents and loss at the end of each step."""

    marks: list[tuple[float, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def tick(self, num_tokens: int, loss: float) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))
        self.tokens.append(num_tokens)
        self.losses.append(loss)

    def figures(self) -> dict[str, Any]:
        """Of all steps but the first `WARMUP_STEPS`; losses of all."""
        (wall, cpu), (wall_end, cpu_end) = self.marks[WARMUP_STEPS - 1], self.marks[-1]
        num_tokens = sum(self.tokens[WARMUP_STEPS:])
        return {
            "tokens_per_s": num_tokens / (wall_end - wall),
            "tokens_per_cpu_s": num_tokens / (cpu_end - cpu),
            "num_tokens": num_tokens,
            "losses": self.losses,
        }


def our_loop(
    rows: PackedRows,
    num_steps: int,
    precision: Precision,
    parallel: Parallel | None = None,
    trainee: Trainee = Trainee(),
) -> dict[str, Any]:
    """`sdft_ray.training.loop.train` with its own choice of attention."""
    clock = Clock()

    def report(record: StepRecord) -> None:
        clock.tick(record.num_tokens, record.loss)

    plan = TrainPlan(
        num_steps=num_steps,
        rows_per_step=trainee.rows_per_step,
        learning_rate=LEARNING_RATE,
        micro_batch_rows=trainee.rows_per_step,
        warmup_fraction=0.0,
        precision=precision,
    )
    train(trainee.make("sdpa"), rows, plan, report=report, parallel=parallel)
    return clock.figures()


def one_of_two(rank: int, core: int, folder: str, rows: PackedRows, num_steps: int) -> dict[str, Any]:
    """One of two workers of our loop in bfloat16, alone on its core; each takes half of every step's rows."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with local_group(rank, 2, Path(folder)) as group:
        return our_loop(rows, num_steps, "bf16", group)


@dataclass(frozen=True)
class Batch:
    """What one step of the bare loop takes. `targets_BT` are the next tokens, ignored where they do not count."""

    inputs: dict[str, Any]
    targets_BT: torch.Tensor
    num_tokens: int


def bare_loop(
    batches: Iterator[Batch],
    num_steps: int,
    precision: Precision,
    trainee: Trainee = Trainee(),
) -> dict[str, Any]:
    """The loop that one writes first: all logits, gradients as autograd leaves them, torch's own parts.

    With `bf16` weights are bfloat16 and the optimizer has float32 masters: what our loop promises, and faster here
    than autocast, which converts the weights in every pass. Attention is the one that our loop chooses.
    """
    clock = Clock()
    model = trainee.make("eager" if precision == "bf16" else "sdpa").train()
    weights = list(model.parameters())
    masters = weights
    if precision == "bf16":
        masters = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
        for weight in weights:
            weight.data = weight.data.bfloat16()  # not model.to(): rotary frequencies stay float32
    optimizer = torch.optim.AdamW(masters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        batch = next(batches)
        logits_BTV = model(**batch.inputs).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten(), ignore_index=_IGNORED)
        loss.backward()
        if masters is not weights:
            _move_gradients(weights, masters)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if masters is not weights:
            _copy(masters, weights)
        clock.tick(batch.num_tokens, loss.item())
    return clock.figures()


def _move_gradients(weights: Sequence[torch.nn.Parameter], masters: Sequence[torch.nn.Parameter]) -> None:
    for weight, master in zip(weights, masters, strict=True):
        assert weight.grad is not None
        master.grad = weight.grad.float()
        weight.grad = None


@torch.no_grad()
def _copy(masters: Sequence[torch.nn.Parameter], weights: Sequence[torch.nn.Parameter]) -> None:
    for master, weight in zip(masters, weights, strict=True):
        weight.copy_(master)


def packed_batches(rows: PackedRows, rows_per_step: int = ROWS_PER_STEP) -> Iterator[Batch]:
    """The rows of our loop's steps, in its order."""
    step = 0
    while True:
        indices = rows_of_step(step, rows.num_rows, rows_per_step, seed=0)
        inputs = attention_inputs(rows, indices)
        num_tokens = int(np.count_nonzero(rows.segment_ids_NT[indices]))
        yield Batch(inputs, _targets(inputs["input_ids"], torch.from_numpy(rows.loss_mask_NT[indices])), num_tokens)
        step += 1


def padded_batches(texts: Sequence[Document], batch_tokens: int) -> Iterator[Batch]:
    """Documents in random order, as many as fit `batch_tokens` when each is padded to the longest of its batch."""
    rng = np.random.default_rng(0)
    chosen: list[Document] = []
    while True:
        for index in rng.permutation(len(texts)):
            longest = max(len(text.ids) for text in (*chosen, texts[index]))
            if longest * (len(chosen) + 1) > batch_tokens:
                yield _padded(chosen)
                chosen = []
            chosen.append(texts[index])


def _padded(texts: Sequence[Document]) -> Batch:
    """Padding on the right, which causal attention never looks at: no mask is needed, and none is the fastest."""
    longest = max(len(text.ids) for text in texts)
    input_ids_BT = torch.full((len(texts), longest), MODEL["pad_token_id"])
    loss_mask_BT = torch.zeros((len(texts), longest), dtype=torch.bool)
    for row, text in enumerate(texts):
        input_ids_BT[row, : len(text.ids)] = torch.tensor(text.ids)
        loss_mask_BT[row, 1 : len(text.ids)] = torch.tensor(text.loss_mask[1:])
    inputs = {"input_ids": input_ids_BT, "use_cache": False}
    return Batch(inputs, _targets(input_ids_BT, loss_mask_BT), sum(len(text.ids) for text in texts))


def _targets(input_ids_BT: torch.Tensor, loss_mask_BT: torch.Tensor) -> torch.Tensor:
    targets_BT = torch.full_like(input_ids_BT, _IGNORED)
    targets_BT[:, :-1] = input_ids_BT[:, 1:].masked_fill(~loss_mask_BT[:, 1:], _IGNORED)
    return targets_BT
