"""LoRA adapters: the merged model computes what peft computes with base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sdft_ray.errors import ModelError
from sdft_ray.importing.importer import import_model
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.loading import load_model
from tests.support.gguf_files import logits_of
from tests.support.tiny import build_model, make_model, make_tokenizer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(folder: Path, *, base: str = "somebody/base", vocab: int | None = None, save: Any = False,
            lora: dict[str, Any] | None = None, **model: Any) -> torch.Tensor:  # fmt: skip
    """Save a random adapter for `build_model(**model)`; returns the logits of both together."""
    plain = build_model(**model)
    if vocab is not None:
        plain.resize_token_embeddings(vocab, mean_resizing=False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    adapted: Any = get_peft_model(plain, LoraConfig(**settings | (lora or {})))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=save)
    return logits_of(adapted.eval())


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "all", "patterns"])
def test_the_merged_model_computes_what_peft_computes(variant: str, tmp_path: Path) -> None:
    lora: dict[str, Any] = {
        "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
        "all": {"target_modules": "all-linear"},
        "patterns": {"rank_pattern": {"v_proj": 2}, "layers_to_transform": [1, 2]},
    }[variant]  # fmt: skip
    base = make_model(tmp_path / "base")
    expected = adapter(tmp_path / "adapter", lora=lora)
    done = import_model(tmp_path / "adapter", tmp_path / "merged", base=base)
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged", "auto")), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(load_model(base, "auto")), expected, atol=1e-2)
    assert not list((tmp_path / "merged").glob("adapter*"))
    (note,) = done.notes
    assert "names somebody/base" in note


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", [{"modules_to_save": ["lm_head"]}, {"target_modules": [*TARGETS, "lm_head"]}])
def test_a_head_that_was_trained_is_stored_also_where_it_was_tied(
    how: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    make_model(tmp_path / "base", tied=tied)
    expected = adapter(tmp_path / "adapter", lora=how, tied=tied)
    import_model(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged", "auto")), expected, atol=1e-4, rtol=1e-4)
    Checkpoint.open(tmp_path / "merged").check_expected()


def test_added_tokens_widen_the_base(tmp_path: Path) -> None:
    make_model(tmp_path / "base", tied=False)
    expected = adapter(
        tmp_path / "adapter", vocab=132, save=True, tied=False, lora={"modules_to_save": ["embed_tokens", "lm_head"]}
    )
    make_tokenizer(tmp_path / "adapter", 132)
    import_model(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    back = load_model(tmp_path / "merged", "auto")
    torch.testing.assert_close(logits_of(back), expected, atol=1e-4, rtol=1e-4)
    assert back.config.vocab_size == 132
    merged, own = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("merged", "adapter"))
    assert merged == own


def test_a_folder_with_model_and_adapter_is_merged(tmp_path: Path) -> None:
    both = make_model(tmp_path / "both")
    expected = adapter(both)
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        Checkpoint.open(both)
    done = import_model(both, tmp_path / "merged")
    torch.testing.assert_close(logits_of(load_model(tmp_path / "merged", "auto")), expected, atol=1e-4, rtol=1e-4)
    assert done.kind == "a base model and a LoRA adapter"


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    make_model(tmp_path / "base", dtype="bfloat16")
    adapter(tmp_path / "adapter")
    import_model(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(tmp_path / "base" / "model.safetensors")[name].double()
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (parts[f"base_model.model.{name[:-7]}.lora_{part}.weight"].double() for part in "AB")
    after = load_file(tmp_path / "merged" / "model.safetensors")[name]
    assert (after == (before + 4 * b @ a).to(torch.bfloat16)).float().mean() > 0.99


def _other_width(base: Path) -> None:
    shutil.rmtree(base)
    make_model(base, hidden=64)


def _fewer_blocks(base: Path) -> None:
    shutil.rmtree(base)
    make_model(base, num_blocks=2)


def _other_family(base: Path) -> None:
    shutil.rmtree(base)
    make_model(base, "phi3", tied=False)


def _another_name(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "somebody/else"}))


ANOTHER: dict[str, tuple[Callable[[Path], None], str]] = {
    "shapes": (_other_width, "does not fit .* has shape"),
    "blocks": (_fewer_blocks, "does not fit .* has no place for"),
    "names": (_other_family, "does not fit"),
    "name on the hub": (_another_name, "was trained on somebody/base, and .* is somebody/else"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_an_adapter_for_another_base_is_refused(case: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter(tmp_path / "adapter")
    change, message = ANOTHER[case]
    change(base)
    with pytest.raises(ModelError, match=message):
        import_model(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_a_base_that_lies_elsewhere_is_not_another_one(tmp_path: Path) -> None:
    right, wrong = make_model(tmp_path / "right"), make_model(tmp_path / "wrong", seed=1)
    adapter(tmp_path / "adapter", base=str(right))
    with pytest.raises(ModelError, match=r"was trained on .*right, not on .*wrong"):
        import_model(tmp_path / "adapter", tmp_path / "merged", base=wrong)
    assert import_model(tmp_path / "adapter", tmp_path / "merged", base=right).notes == ()


def test_a_base_has_to_be_given_and_to_be_a_model(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="without its base model"):
        import_model(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ModelError, match="is no model folder"):
        import_model(tmp_path / "adapter", tmp_path / "merged", base=tmp_path)
    with pytest.raises(ModelError, match="--base means nothing"):
        import_model(make_model(tmp_path / "base"), tmp_path / "merged", base=tmp_path / "base")


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            import_model(tmp_path / "adapter", tmp_path / "merged", base=base)

    weights.write_bytes(whole[:-10])
    refused("truncated or damaged")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    refused(f"lacks {first}")
    save_file({**tensors, first: tensors[first] * float("nan")}, weights)
    refused("not finite")
    weights.unlink()
    refused("holds adapter_config.json but no")


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    prefix: PeftModel = get_peft_model(build_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))  # type: ignore[assignment]
    prefix.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="'PREFIX_TUNING'; only LoRA"):
        import_model(tmp_path / "adapter", tmp_path / "merged", base=base)
