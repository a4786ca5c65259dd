"""Tiny GGUF files of every family compute what the model computes that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sdft_ray.errors import ModelError
from sdft_ray.importing.importer import Imported, import_model
from sdft_ray.models.loading import load_model
from tests.support.gguf_files import logits_of, write_gguf
from tests.support.tiny import CHAT_TEMPLATE, FAMILIES, build_model, make_tokenizer

VOCAB = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB)


def made(
    tokenizer: Path, folder: Path, family: str = "llama", *, gguf: dict[str, Any] | None = None, **config: Any
) -> tuple[Any, Path]:
    """A tiny model, and the GGUF file made of it."""
    model = build_model(family, vocab_size=VOCAB, **config)
    return model, write_gguf(
        model, folder / "tiny.gguf", **({"tokenizer": tokenizer, "chat_template": CHAT_TEMPLATE} | (gguf or {}))
    )


def imported(file: Path, folder: Path, **options: Any) -> tuple[Imported, Any]:
    done = import_model(file, folder / "out", **options)
    return done, load_model(folder / "out", "auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_function(family: str, tokenizer: Path, tmp_path: Path) -> None:
    tied = family.startswith("gemma")
    settings: dict[str, Any] = {"phi3": {"sliding_window": 8}}.get(family, {})
    model, file = made(tokenizer, tmp_path, family, tied=tied, **settings)
    done, back = imported(file, tmp_path)
    torch.testing.assert_close(logits_of(back), logits_of(model), atol=1e-5, rtol=1e-5)
    assert done.notes == ()
    assert done.dtype == "float32"


SCALED = {
    "llama3": ("llama", {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, {}),
    "linear": ("qwen2", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
               {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": ("qwen3", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                       "original_max_position_embeddings": 64},
             {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}),
    "longrope": ("phi3", {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                          "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [4.0] * 6,
                          "original_max_position_embeddings": 64},
                 {"rope.scaling.original_context_length": 64}),
    "partial": ("phi3", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_frequencies_are_not_lost(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    family, rope, fields = SCALED[kind]
    config: dict[str, Any] = {"rope_parameters": rope, "tied": False, "hidden": 64}
    if family in ("llama", "qwen3"):
        config["head_dim"] = 64 if kind == "llama3" else 16
    if kind == "longrope":
        config["original_max_position_embeddings"] = 64
    tensors = {}
    if kind == "llama3":
        steps = np.arange(0, 64, 2) / 64
        inverse = build_model(family, vocab_size=VOCAB, **config).model.rotary_emb.inv_freq.numpy()  # type: ignore[union-attr]
        tensors["rope_freqs.weight"] = (500000.0**-steps / inverse).astype(np.float32)
    if kind == "longrope":
        tensors = {f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
                   for length in ("long", "short")}  # fmt: skip
    model, file = made(tokenizer, tmp_path, family, gguf={"fields": fields, "tensors": tensors}, **config)
    done, back = imported(file, tmp_path)
    torch.testing.assert_close(logits_of(back, 80), logits_of(model, 80), atol=1e-4, rtol=1e-4)
    unscaled = build_model(
        family,
        vocab_size=VOCAB,
        **{
            **config,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"], "partial_rotary_factor": 1.0},
        },
    )
    assert not torch.allclose(logits_of(unscaled, 80), logits_of(model, 80), atol=1e-3)
    assert done.notes == ()


def test_tokenizer_and_template_come_along(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path)
    imported(file, tmp_path)
    before, after = AutoTokenizer.from_pretrained(tokenizer), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Tom has 12 apples.\n  <|user|>Ann"
    assert after(text)["input_ids"] == before(text)["input_ids"], "with its BOS"
    messages = [{"role": "user", "content": "Who is taller?"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(messages, tokenize=False)


def test_quantized_weights_are_those_of_gguf_and_it_is_said(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path, gguf={"kind": "Q8_0"})
    done, back = imported(file, tmp_path)
    direct = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(logits_of(back), logits_of(direct))
    (note,) = done.notes
    assert "quantized to Q8_0 (29 tensors)" in note
    assert "quantized to Q8" in (tmp_path / "out" / "README.md").read_text().replace("\\", "")


def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path, gguf={"kind": "F16"})
    done, back = imported(file, tmp_path)
    assert (done.dtype, back.dtype, done.notes) == ("float16", torch.float16, ())
    rounded = import_model(file, tmp_path / "rounded", dtype="bfloat16")
    assert load_model(tmp_path / "rounded", "auto").dtype == torch.bfloat16
    assert rounded.notes == ("the weights were rounded from float16 to bfloat16, as asked for",)


def test_generation_stops_where_the_template_ends_a_turn(tokenizer: Path, tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("<|end|>", "<|system|>")
    _, file = made(tokenizer, tmp_path, gguf={"chat_template": template})
    done, _ = imported(file, tmp_path)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, 6]
    assert done.notes == (
        "<|system|> ends a turn in the chat template: added to eos_token_id in generation_config.json",
    )


def test_a_base_model_says_that_it_has_no_template(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path, gguf={"chat_template": None})
    done, _ = imported(file, tmp_path)
    assert any(note.startswith("there is no chat template") for note in done.notes)


def test_a_truncated_file_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path)
    whole = file.read_bytes()
    for length in (2, 30, 2_000, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"truncated or damaged|not a GGUF file"):
            import_model(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"], "nothing half-written is left"


REFUSED = {
    "no tokenizer": ({"tokenizer": None}, "holds no tokenizer"),
    "architecture": ({"architecture": "granitehybrid"}, "transformers cannot read GGUF files of the architecture"),
    "experts": ({"fields": {"expert_count": 8}}, r"llama\.expert_count"),
    "window": ({"fields": {"attention.sliding_window": 8}}, r"attention\.sliding_window"),
    "scaling": ({"fields": {"rope.scaling.type": "dynamic"}}, r"rope\.scaling\.type"),
    "divisors": ({"tensors": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}}, "unlike Llama"),
    "more weights": ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "weights, but a llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_drop_is_refused_by_name(case: str, tokenizer: Path, tmp_path: Path) -> None:
    gguf, message = REFUSED[case]
    _, file = made(tokenizer, tmp_path, gguf=gguf)
    with pytest.raises(ModelError, match=message):
        import_model(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fields_that_nobody_reads_are_told(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path, gguf={"fields": {"attention.novelty": 3}})
    done, _ = imported(file, tmp_path)
    assert done.notes == ("not read from the file: llama.attention.novelty = 3",)


@pytest.mark.parametrize(("pre", "single"), [("smollm", True), ("llama-bpe", False), ("novel", False)])
def test_text_is_split_as_the_file_says(pre: str, single: bool, tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path, gguf={"pre": pre})
    done, _ = imported(file, tmp_path)
    back: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = [part for part, _ in back.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")]
    assert parts == (["a", "Ġ", "1", "2", "3"] if single else ["a", "Ġ123"] if pre == "novel" else ["a", "Ġ", "123"])
    model = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert model["ignore_merges"] == (pre == "llama-bpe")
    assert any("'novel', which transformers does not know" in note for note in done.notes) == (pre == "novel")


def test_neighbours_of_the_file_are_not_read(tokenizer: Path, tmp_path: Path) -> None:
    model, file = made(tokenizer, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("another")
    _, back = imported(file, tmp_path)
    torch.testing.assert_close(logits_of(back), logits_of(model), atol=1e-5, rtol=1e-5)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_config_is_read_by_stock_transformers(tokenizer: Path, tmp_path: Path) -> None:
    _, file = made(tokenizer, tmp_path)
    imported(file, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["LlamaForCausalLM"]
    assert getattr(config, "quantization_config", None) is None
