"""What goes with a model into its pruned copy, its student and its release: all but weights, by exclusion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from sdft_ray.models.companions import SKIPPED_ON_DOWNLOAD, companions, copy_companions, is_companion, is_licence
from sdft_ray.models.licence import find_licence
from sdft_ray.models.loading import load_model
from sdft_ray.models.surgery import drop_blocks
from sdft_ray.training.export import save_student
from tests.support import tiny

TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json",
    "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "tokenizer.model.v3", "tiktoken.model",
    "qwen.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "emoji_tokenizer.json", "SYSTEM_PROMPT.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja", "generation_config.json",
    "preprocessor_config.json",
)  # fmt: skip
LICENCES = (
    "LICENSE", "license.txt", "LICENCE", "LICENCE.md", "License.pdf", "COPYING", "COPYING.LESSER", "Notice",
    "NOTICE.txt", "ThirdPartyNotices.txt", "USE_POLICY.md", "Gemma_Terms_of_Use.txt", "MODEL-LICENSE",
    "LLAMA-2-LICENSE", "qwen-licence.txt", "legal/terms.txt", "LEGAL/eu/addendum.txt", "LICENSES/MIT.txt",
    "third-party-licenses/a.txt",
)  # fmt: skip
LEFT_OUT = (
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.safetensors",
    "consolidated.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
    "model-q4.gguf", "model.onnx", "model.onnx_data", "tf_model.h5", "flax_model.msgpack", "model.ckpt", "optimizer.pt",
    "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "all_results.json",
    "config.json", "config_1m.json", "params.json", "adapter_config.json", "adapter_model.safetensors",
    "quantize_config.json", "modeling_llama.py", "tokenization_llama.py", "kernel.so", "README.md", "README_zh.md",
    "readme.txt", "MODEL_CARD.md", "picture.png", "paper.pdf", "train.jsonl", "run.log", "manifest.json",
    "history.jsonl", "sdft_recovery.json", "sdft_recipe.yaml", ".gitattributes", ".cache/huggingface/LICENSE",
    "original/tokenizer.model", "onnx/tokenizer.json", "checkpoint-500/tokenizer.json", "runs/LICENSE",
    "1_Pooling/config.json", "legal/model.bin", "LICENSE-7b.safetensors",
)  # fmt: skip


def test_by_name() -> None:
    assert [name for name in (*TOKENIZERS, *LICENCES) if not is_companion(name)] == []
    assert [name for name in LEFT_OUT if is_companion(name)] == []
    assert [name for name in LICENCES if not is_licence(name)] == []
    assert [name for name in TOKENIZERS if is_licence(name)] == []


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A small model, with every name that is not taken yet."""
    source = tiny.make_model(tmp_path / "teacher", "llama")
    for name in (*TOKENIZERS, *LICENCES, *LEFT_OUT):
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() and name not in ("adapter_config.json", "tekken.json", "model.safetensors.index.json"):
            place.write_text("Apache License Version 2.0" if "LICEN" in name else f"content of {name}")
    return source


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_pruned_models_and_students_have_them(teacher: Path, tmp_path: Path) -> None:
    expected = names(teacher) & {*TOKENIZERS, *LICENCES}
    assert len(expected) > 35
    drop_blocks(teacher, tmp_path / "pruned", [0, 1])
    assert names(tmp_path / "pruned") - expected == {"config.json", "model.safetensors"}
    assert names(tmp_path / "pruned") >= expected
    model = load_model(tmp_path / "pruned", "float32")
    save_student(model, tmp_path / "pruned", tmp_path / "student")
    assert names(tmp_path / "student") == names(tmp_path / "pruned")
    for name in expected:
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    assert torch.equal(load_model(tmp_path / "student", "float32").lm_head.weight, model.lm_head.weight)


def test_a_copy_replaces_and_links_are_followed(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    source.mkdir()
    target.mkdir()
    (tmp_path / "blob").write_text("new")
    (source / "tekken.json").symlink_to(tmp_path / "blob")  # as in the cache of the hub
    (source / "gone.json").symlink_to(tmp_path / "nowhere")
    (target / "tekken.json").write_text("old")
    copy_companions(source, target)
    assert list(companions(target)) == ["tekken.json"]
    assert (target / "tekken.json").read_text() == "new"
    assert not (target / "tekken.json").is_symlink()


@pytest.mark.parametrize("name", LICENCES)
def test_every_spelling_of_a_licence_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("Apache License\nVersion 2.0", encoding="utf-8")
    found = find_licence([tmp_path])
    assert found is not None
    assert found.identifier == "apache-2.0"


def test_they_are_downloaded() -> None:
    wanted = {*TOKENIZERS, *LICENCES, "config.json", "model.safetensors", "model.safetensors.index.json"}
    kept = set(filter_repo_objects([*wanted, *LEFT_OUT], ignore_patterns=[*SKIPPED_ON_DOWNLOAD]))
    assert wanted <= kept
    heavy = {name for name in LEFT_OUT if name.endswith((".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".py"))}
    assert not heavy & kept
