"""Training a teacher: what it learns from, what it writes, and that helpers change nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sdft_ray.errors import ResourceError
from sdft_ray.lab import teacher
from sdft_ray.lab.documents import encode
from sdft_ray.lab.export import TEACHER
from sdft_ray.lab.mixture import Sample
from sdft_ray.lab.teacher import RECORD, TeacherRecipe, build_teacher, train_teacher
from sdft_ray.training.plan import StepRecord

SHORT = TeacherRecipe(num_tokens=12_000)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(TEACHER)


def test_a_chat_has_loss_on_the_response_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    document = encode(Sample("How many?", "Start: 3. #### 3", True, "word_problems", "chat"), tokenizer)
    learned = [token for token, mark in zip(document.ids, document.loss_mask, strict=True) if mark]
    assert tokenizer.decode(learned) == "Start: 3. #### 3<|end|>"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Start: 3. #### 3"}]
    assert tokenizer.decode(document.ids) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_human_document_has_loss_on_the_annotators_text_and_no_chat_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    document = encode(Sample("Q. Why?\nNotes by Otto:", "because", False, "facts", "human"), tokenizer)
    learned = [token for token, mark in zip(document.ids, document.loss_mask, strict=True) if mark]
    assert tokenizer.decode(learned) == " because<|end|>"
    assert tokenizer.decode(document.ids) == "<|begin|>Q. Why?\nNotes by Otto: because<|end|>"


def test_the_untrained_model_has_the_promised_size(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_teacher(tokenizer, SHORT)
    assert 2.3e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.5e6
    weights = dict(model.named_parameters())
    out = weights["model.layers.0.mlp.down_proj.weight"].detach().std()
    inner = weights["model.layers.0.mlp.up_proj.weight"].detach().std()
    assert float(inner) == pytest.approx(0.04, rel=0.05)
    assert float(out) == pytest.approx(0.04 / 24**0.5, rel=0.05)
    again = build_teacher(tokenizer, SHORT)
    assert torch.equal(model.model.embed_tokens.weight, again.model.embed_tokens.weight)


@dataclass(frozen=True)
class ShortTraining:
    """What one short training wrote, returned and reported."""

    folder: Path
    record: dict[str, Any]
    losses: list[float]


def short_training(folder: Path, num_threads: int) -> ShortTraining:
    losses: list[float] = []
    record = train_teacher(
        folder, num_threads=num_threads, report=lambda step: losses.append(step.loss), recipe=SHORT, compiled=False
    )
    return ShortTraining(folder, record, losses)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> ShortTraining:
    return short_training(tmp_path_factory.mktemp("alone"), num_threads=1)


@pytest.mark.slow
def test_a_short_training_learns_and_leaves_an_ordinary_checkpoint(alone: ShortTraining) -> None:
    assert alone.losses[-1] < alone.losses[0] - 0.5
    assert json.loads((alone.folder / RECORD).read_text()) == alone.record
    assert alone.record["num_tokens"] > 10_000
    model = AutoModelForCausalLM.from_pretrained(alone.folder)
    loaded = AutoTokenizer.from_pretrained(alone.folder)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(loaded) == 1200
    assert model.generation_config.eos_token_id == loaded.eos_token_id


@pytest.mark.slow
def test_two_processes_follow_the_same_losses_as_one(alone: ShortTraining, tmp_path: Path) -> None:
    assert short_training(tmp_path, num_threads=2).losses == pytest.approx(alone.losses, rel=0.02)


def test_a_machine_that_is_too_slow_is_told_early() -> None:
    watch = teacher._watched(None, None, None, num_steps=1000, seconds_left=60.0)  # type: ignore[arg-type]
    step = StepRecord(step=1, loss=1.0, grad_norm=1.0, learning_rate=0.1, num_tokens=1, num_loss_tokens=1, wall_s=0.1)
    for _ in range(teacher.TIMED_STEPS - 1):
        watch(step)
    with pytest.raises(ResourceError, match="would take 2 minutes"):
        watch(step)
