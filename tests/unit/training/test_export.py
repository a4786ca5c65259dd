"""A saved student is an ordinary Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.models.loading import load_model
from sdft_ray.training.export import save_student
from sdft_ray.training.lora import attach
from tests.support.tiny import make_model

IDS = torch.arange(16)[None]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_student_loads_with_its_weights_tokenizer_and_template(tmp_path: Path, dtype: str | None):
    source = make_model(tmp_path / "pruned", vocab_size=300)
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "manifest.json").write_text("{}")
    model: Any = load_model(source, "float32")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.25)
    save_student(model, source, tmp_path / "student", dtype=dtype)
    student: Any = load_model(tmp_path / "student", "auto")
    assert student.dtype == (torch.bfloat16 if dtype else torch.float32)
    with torch.no_grad():
        assert torch.equal(student(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert student.generation_config.eos_token_id == 2
    chat, original = (ChatFormat(load_tokenizer(d)) for d in (tmp_path / "student", source))
    assert chat.encode("Why?", "Because.") == original.encode("Why?", "Because.")
    assert not (tmp_path / "student" / "manifest.json").exists()


@pytest.mark.parametrize("known", [None, 5, [5, 6]])
def test_the_end_of_turn_ends_generation_in_any_engine(tmp_path: Path, known: Any):
    """A ChatML model may have another token as its only EOS."""
    source = make_model(tmp_path / "pruned", vocab_size=300)
    path = source / "generation_config.json"
    path.unlink(missing_ok=True)
    if known is not None:
        path.write_text(json.dumps({"eos_token_id": known, "top_p": 0.5}))
    before = path.read_bytes() if known is not None else b""
    save_student(load_model(source, "float32"), source, tmp_path / "student")
    config = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert set(config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]) >= {2}
    if known is not None:
        assert config == {"eos_token_id": [*([known] if isinstance(known, int) else known), 2], "top_p": 0.5}
        assert path.read_bytes() == before, "the checkpoint that it started from stays as it is"


def test_adapters_must_be_merged_first(tmp_path: Path):
    model: Any = load_model(make_model(tmp_path / "pruned"), "float32")
    with pytest.raises(AssertionError, match="merge"):
        save_student(attach(model, 2, 4.0, 0.0, ["q_proj"]), tmp_path / "pruned", tmp_path / "student")
