"""Objectives on cached signals against the same objectives with the teacher beside the student.

Here the teacher reads what the student reads, so that both ways speak of one distribution; generation's teacher reads
the rewriting prompt.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, attention_inputs, pack
from sdft_ray.data.signal_rows import SignalRows, SignalWriter
from sdft_ray.data.signals import (
    Signals,
    TopLogprobs,
    decode_hidden,
    decode_top,
    encode_hidden,
    encode_top,
    top_logprobs,
)
from sdft_ray.models.head import load_head
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.cached import CachedTeacher
from sdft_ray.training.loop import StepRecord, TrainPlan, train
from sdft_ray.training.losses import Teacher, response_loss
from tests.support.tiny import build_model, make_model

VOCAB = 128
LENGTHS, MARKED = [11, 7, 6, 5, 9, 3], [6, 3, 2, 4, 5, 1]
DOCUMENTS = [
    Document([(7 * n + 3 * i) % VOCAB for i in range(n)], [i >= n - m for i in range(n)])
    for n, m in zip(LENGTHS, MARKED, strict=True)
]
NUM_MARKED = sum(MARKED)
ONLINE = Objective(cross_entropy=0.0, forward_kl=1.0)
TOP = Objective(cross_entropy=0.0, top_k_kl=1.0)


@pytest.fixture
def rows() -> PackedRows:
    return pack(DOCUMENTS, 16)


def student() -> Any:
    return build_model("llama", num_blocks=2, seed=1)


@torch.no_grad()
def kept(model: Any, rows: PackedRows, k: int, *, coded: bool = False) -> list[Signals]:
    """What the sampler would record of each document, had it drawn the marked tokens; in float32 or as stored.

    From the rows themselves: in bfloat16 another batch gives other hidden states.
    """
    inputs = attention_inputs(rows, range(rows.num_rows))
    hidden_NTD = model.get_decoder()(**inputs).last_hidden_state
    logprobs_NTV = model(**inputs).logits.float().log_softmax(-1)
    found = []
    for document in range(len(DOCUMENTS)):
        row_T, token_T = (rows.loss_mask_NT & (rows.document_ids_NT == document)).nonzero()
        bits_TD = hidden_NTD[row_T, token_T - 1].bfloat16().view(torch.int16)
        hidden_TD = bits_TD.numpy().view(np.uint16)
        best_TK = logprobs_NTV[row_T, token_T - 1].topk(k)
        top = top_logprobs(best_TK.indices.numpy(), best_TK.values.numpy(), VOCAB)
        if coded:
            top, hidden_TD = decode_top(*encode_top(top)), decode_hidden(encode_hidden(hidden_TD), len(hidden_TD))
        found.append(Signals(top, hidden_TD))
    return found


def cached_teacher(
    folder: Path,
    model: Any,
    rows: PackedRows,
    k: int = VOCAB,
    *,
    head: Any = None,
    softcap: float | None = None,
    coded: bool = False,
    silent: tuple[int, ...] = (),
) -> CachedTeacher:
    """Signals through their file; documents in `silent` have none."""
    writer = SignalWriter(folder, [0 if i in silent else length for i, length in enumerate(MARKED)])
    for i, signals in enumerate(kept(model, rows, k, coded=coded)):
        if i not in silent:
            writer.put(i, signals)
    writer.close()
    return CachedTeacher(rows, SignalRows.load(folder), head, softcap)


def loss_and_gradient(
    rows: PackedRows, objective: Objective, *, cached: CachedTeacher | None = None, **settings: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = student()
    everything = range(rows.num_rows)
    told = None if cached is None else cached.outputs(everything, "cpu")
    mask_BT = torch.from_numpy(rows.loss_mask_NT)
    loss = response_loss(
        model, attention_inputs(rows, everything), mask_BT, objective=objective, cached=told, **settings
    )
    loss.backward()
    return loss.detach() / NUM_MARKED, {name: p.grad / NUM_MARKED for name, p in model.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    """Per response token, in nats: within 1e-5, loss and every gradient."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert expected[0] > 0.1
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("max_logits", [2**23, 5 * VOCAB])  # all at once; five tokens at a time
def test_the_top_k_of_a_whole_vocabulary_are_the_teacher(rows: PackedRows, tmp_path: Path, max_logits: int) -> None:
    teacher = build_model("llama", num_blocks=3, seed=2)
    expected = loss_and_gradient(rows, ONLINE, teacher=Teacher(teacher))
    cached = cached_teacher(tmp_path / "signals", teacher, rows)
    assert_same(loss_and_gradient(rows, TOP, cached=cached, max_logits=max_logits), expected)


def test_more_kept_tokens_come_closer_to_the_teacher(rows: PackedRows, tmp_path: Path) -> None:
    teacher = build_model("llama", num_blocks=3, seed=2)
    full, full_gradient = loss_and_gradient(rows, ONLINE, teacher=Teacher(teacher))
    losses, gaps = [], []
    for k in (1, 2, 4, 8, 16, 32, 64, 127, VOCAB):
        loss, gradient = loss_and_gradient(rows, TOP, cached=cached_teacher(tmp_path / str(k), teacher, rows, k))
        losses.append(loss.item())
        squares = [(gradient[name] - wanted).square().sum() for name, wanted in full_gradient.items()]
        gaps.append(torch.stack(squares).sum().sqrt().item())
    assert losses[0] < 0.5 * full.item()
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(full.item(), abs=1e-5)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-5


@pytest.mark.parametrize("k", [16, VOCAB])
def test_the_code_of_log_probabilities_costs_little(rows: PackedRows, tmp_path: Path, k: int) -> None:
    """Eight bits a log-probability. `encode_top` states the error of each one; KL is off by less than the worst."""
    teacher = build_model("llama", num_blocks=3, seed=2)
    exact = cached_teacher(tmp_path / "exact", teacher, rows, k)
    coded = cached_teacher(tmp_path / "coded", teacher, rows, k, coded=True)
    expected, found = (loss_and_gradient(rows, TOP, cached=cached)[0].item() for cached in (exact, coded))
    assert found != expected
    assert found == pytest.approx(expected, abs=0.002)


FULL: dict[str, Any] = {
    "forward_kl": 1.0,
    "reverse_kl": 0.5,
    "jensen_shannon": 2.0,
    "temperature": 2.0,
    "cross_entropy": 0.25,
}


@pytest.mark.slow
@pytest.mark.parametrize("max_logits", [2**23, 5 * VOCAB])
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma2", "bfloat16"), ("llama", "float32")])
def test_hidden_states_through_the_head_are_the_teacher(
    rows: PackedRows, tmp_path: Path, family: str, dtype: str, max_logits: int
) -> None:
    """Kept in bfloat16, which is what a bfloat16 teacher computes, and a float32 one here: see `rounded`."""
    softcap: dict[str, Any] = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    folder = make_model(tmp_path / "teacher", family, num_blocks=3, seed=2, dtype=dtype, **softcap)
    teacher: Any = build_model(family, num_blocks=3, seed=2, dtype=dtype, **softcap)
    rounded(teacher)
    expected = loss_and_gradient(rows, Objective(**FULL), teacher=Teacher(teacher))
    head, cap = load_head(folder, dtype)
    cached = cached_teacher(tmp_path / "signals", teacher, rows, head=head, softcap=cap, coded=True)
    objective = Objective(teacher_logits="cached", **FULL)
    assert_same(loss_and_gradient(rows, objective, cached=cached, max_logits=max_logits), expected)


def rounded(model: Any) -> None:
    """Let the final norm give values that bfloat16 holds."""
    model.get_decoder().norm.register_forward_hook(lambda _module, _inputs, output: output.bfloat16().to(output.dtype))


def test_hidden_states_of_a_float32_teacher_are_a_rounding(rows: PackedRows, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "teacher", num_blocks=3, seed=2)
    teacher = build_model("llama", num_blocks=3, seed=2)
    expected, _ = loss_and_gradient(rows, ONLINE, teacher=Teacher(teacher))
    cached = cached_teacher(tmp_path / "signals", teacher, rows, head=load_head(folder, "float32")[0])
    found, _ = loss_and_gradient(rows, ONLINE.model_copy(update={"teacher_logits": "cached"}), cached=cached)
    assert 0 < abs(found - expected) < 2**-8


@pytest.mark.parametrize("max_logits", [2**23, VOCAB])  # one token at a time: chunks without any signal
@pytest.mark.parametrize("kind", ["top_k_kl", "forward_kl"])
def test_documents_without_signals_add_cross_entropy_alone(
    rows: PackedRows, tmp_path: Path, kind: str, max_logits: int
) -> None:
    """Each term by itself: the divergence of the documents with signals, and the cross-entropy of all."""
    silent = (0, 3, 5)
    folder = make_model(tmp_path / "teacher", num_blocks=3, seed=2)
    teacher = build_model("llama", num_blocks=3, seed=2)
    rounded(teacher)
    speaking = pack([document for i, document in enumerate(DOCUMENTS) if i not in silent], 16)
    expected, gradient = loss_and_gradient(speaking, ONLINE, teacher=Teacher(teacher))
    told_as, _ = loss_and_gradient(rows, Objective())

    head = load_head(folder, "float32")[0] if kind == "forward_kl" else None
    cached = cached_teacher(tmp_path / "signals", teacher, rows, head=head, silent=silent)
    terms: dict[str, Any] = {kind: 1.0, "teacher_logits": "cached" if kind == "forward_kl" else "online"}
    alone = Objective(cross_entropy=0.0, **terms)
    assert_same(loss_and_gradient(rows, alone, cached=cached, max_logits=max_logits), (expected, gradient))
    sums: dict[str, torch.Tensor] = {}
    loss_and_gradient(rows, Objective(**terms), cached=cached, sums=sums, max_logits=max_logits)
    assert sums[kind].item() / NUM_MARKED == pytest.approx(expected.item(), abs=1e-5)
    assert sums["cross_entropy"].item() / NUM_MARKED == pytest.approx(told_as.item(), abs=1e-5)


def test_impossible_tokens_and_a_whole_vocabulary_without_tail(rows: PackedRows, tmp_path: Path) -> None:
    """A teacher that gives probability to a few tokens only: finite loss and gradient."""
    writer = SignalWriter(tmp_path / "signals", MARKED)
    for i, length in enumerate(MARKED):
        logprobs_TK = np.full((length, VOCAB), -np.inf, np.float32)
        logprobs_TK[:, 3:5] = np.log(0.5)
        ids_TK = np.tile(np.arange(VOCAB, dtype=np.int32), (length, 1))
        tail_T = np.full(length, -np.inf, np.float32)
        writer.put(i, Signals(TopLogprobs(ids_TK, logprobs_TK, tail_T, VOCAB)))
    writer.close()
    loss, gradient = loss_and_gradient(rows, TOP, cached=CachedTeacher(rows, SignalRows.load(tmp_path / "signals")))
    model = student()
    total = 0.0
    for document in DOCUMENTS:
        log_probs_TV = model(input_ids=torch.tensor([document.ids])).logits[0].log_softmax(-1)
        marked = slice(document.loss_mask.index(True) - 1, -1)
        total += (np.log(0.5) - log_probs_TV[marked, 3:5].mean(-1)).sum().item()
    assert loss.item() == pytest.approx(total / NUM_MARKED, rel=1e-5)
    assert all(torch.isfinite(value).all() for value in gradient.values())


@pytest.mark.slow
def test_training_on_either_is_the_same_training(rows: PackedRows, tmp_path: Path) -> None:
    """Whole steps: micro-batches, rows in their random order, over more than an epoch."""
    folder = make_model(tmp_path / "teacher", num_blocks=3, seed=2)
    teacher = build_model("llama", num_blocks=3, seed=2)
    rounded(teacher)
    plan = TrainPlan(num_steps=4, rows_per_step=5, learning_rate=1e-3, micro_batch_rows=2, objective=ONLINE)
    cached = cached_teacher(tmp_path / "signals", teacher, rows, head=load_head(folder, "float32")[0])
    by_head = replace(plan, objective=ONLINE.model_copy(update={"teacher_logits": "cached"}))
    runs: list[list[StepRecord]] = []
    for asked in (plan, by_head, replace(plan, objective=TOP)):
        runs.append([])
        online = Teacher(teacher) if asked is plan else None
        train(student(), rows, asked, teacher=online, cached=None if online else cached, report=runs[-1].append)
    for run in runs[1:]:
        assert [r.loss for r in run] == pytest.approx([r.loss for r in runs[0]], abs=1e-5)
        assert [r.grad_norm for r in run] == pytest.approx([r.grad_norm for r in runs[0]], rel=1e-4)
