"""Sentence embeddings by hand, one text at a time, and what the cosines say together against numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, RobertaConfig, RobertaModel

from sdft_ray.errors import EvaluationError, ModelError
from sdft_ray.evaluation.similarity import (
    Embedder,
    Pair,
    answer_pairs,
    check_embedder,
    embed,
    likeness,
    load_embedder,
)
from tests.support.embedder import MAX_TOKENS, make_embedder
from tests.support.tiny import make_model, make_tokenizer

TEXTS = ["it is 4", "Ann is taller than Tom, and that is all.", "", "fig, pear, plum", "it is  5", "7"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedder(tmp_path_factory.mktemp("models") / "embedder", pooling="mean")


@pytest.fixture(scope="module")
def embedder(directory: Path) -> Embedder:
    return load_embedder(directory)


@torch.no_grad()
def by_hand(directory: Path, text: str) -> np.ndarray:
    """Alone, without padding, the plain mean of all positions."""
    ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"][:MAX_TOKENS]
    states = BertModel.from_pretrained(directory).eval()(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    mean = np.add.reduce(states) / len(ids)
    return mean / np.sqrt((mean**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_equal_those_of_sentence_transformers(pooling: str, tmp_path: Path) -> None:
    """Bit for bit, in equal batches: one text alone, and all of them padded to one length."""
    from sentence_transformers import SentenceTransformer

    directory = make_embedder(tmp_path / "embedder", pooling=pooling)
    (directory / "2_Normalize").mkdir()
    texts = [*TEXTS, "How many apples are left? " * 20]
    theirs = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    ours = load_embedder(directory)
    for number, batch_tokens in ((1, 1), (len(texts), 4096)):
        expected = theirs.encode(texts, batch_size=number, show_progress_bar=False)
        vectors_ND, cut = embed(ours, texts, batch_tokens=batch_tokens)
        np.testing.assert_array_equal(vectors_ND.numpy(), expected)
        assert cut == {len(texts) - 1}


@pytest.mark.parametrize("mode", ["cls", ["cls"], ["cls", "mean"]])
def test_pooling_in_the_files_of_sentence_transformers_6(mode: object, directory: Path, tmp_path: Path) -> None:
    copy = copied(directory, tmp_path)
    (copy / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": mode}), encoding="utf-8")
    if isinstance(mode, list) and len(mode) > 1:
        with pytest.raises(ModelError, match="another pooling than mean or CLS: cls, mean"):
            load_embedder(copy)
    else:
        assert load_embedder(copy).pooling == "cls"


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_embeddings_are_those_of_each_text_alone(directory: Path, embedder: Embedder, batch_tokens: int) -> None:
    progress: list[tuple[int, int]] = []
    vectors_ND, cut = embed(
        embedder, TEXTS, batch_tokens=batch_tokens, on_batch=lambda done, total: progress.append((done, total))
    )
    expected = np.stack([by_hand(directory, text) for text in TEXTS])
    np.testing.assert_allclose(vectors_ND.numpy(), expected, atol=1e-5)
    assert cut == set()
    assert progress[-1] == (len(TEXTS), len(TEXTS))
    assert len(progress) == len(TEXTS) if batch_tokens == 1 else len(progress) < len(TEXTS)


def test_no_batch_holds_more_positions_than_asked(embedder: Embedder) -> None:
    sizes: list[int] = []
    hook = embedder.model.register_forward_pre_hook(
        lambda _m, _a, kw: sizes.append(kw["input_ids"].numel()), with_kwargs=True
    )
    embed(embedder, TEXTS, batch_tokens=40)
    hook.remove()
    assert max(sizes) <= 40
    assert 1 < len(sizes) < len(TEXTS)


def test_long_texts_are_cut_to_what_the_model_reads(directory: Path, embedder: Embedder) -> None:
    text = "Tom has 12 apples and gives 5 to Ann. " * 10
    vectors_ND, cut = embed(embedder, ["7", text])
    assert embedder.max_tokens == MAX_TOKENS
    assert cut == {1}
    np.testing.assert_allclose(vectors_ND[1].numpy(), by_hand(directory, text), atol=1e-5)


def test_what_all_pairs_say(directory: Path, embedder: Embedder) -> None:
    long = "How many apples are left? " * 20
    answers = [("it is 4", "it is  5"), ("", ""), ("", "7"), ("7", "fig, pear, plum"), (long, "7"), ("  ", "7")]
    pairs = [Pair("task", str(i), *texts) for i, texts in enumerate(answers)]
    found, values = likeness(embedder, pairs, batch_tokens=64)
    expected = np.array([by_hand(directory, a) @ by_hand(directory, b) for a, b in answers])
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert values[1] == pytest.approx(1.0, abs=1e-6), "two empty answers are alike"
    assert min(values) >= -1
    assert max(values) <= 1
    assert found.mean.value == pytest.approx(expected.mean(), abs=1e-5)
    assert found.mean.stderr == pytest.approx(expected.std(ddof=1) / 6**0.5, abs=1e-5)
    assert found.low == pytest.approx(np.quantile(expected, 0.05), abs=1e-5)
    assert (found.num_answers, found.num_empty, found.num_cut) == (6, 3, 1)


def test_one_pair_and_none(embedder: Embedder) -> None:
    found, values = likeness(embedder, [Pair("task", "0", "it is 4", "7")])
    assert found.mean.value == found.low == values[0]
    assert found.mean.stderr is None
    found, values = likeness(embedder, [])
    assert (found.num_answers, found.mean.value, found.mean.stderr, found.low, values) == (0, None, None, None, [])


def row(task: str, item: str, response: str) -> dict[str, str]:
    return {"task": task, "item": item, "response": response}


def test_answers_are_joined_by_task_and_item() -> None:
    teacher = [row("a", "1", "x"), row("b", "1", "y"), row("a", "10", "z")]
    student = [row("b", "1", "Y"), row("a", "10", "Z"), row("a", "1", "X")]
    assert answer_pairs(teacher, student) == [
        Pair("a", "1", "x", "X"), Pair("b", "1", "y", "Y"), Pair("a", "10", "z", "Z"),
    ]  # fmt: skip
    with pytest.raises(EvaluationError, match="item 10 of a was answered by one model alone"):
        answer_pairs(teacher, student[:1] + student[2:])
    with pytest.raises(EvaluationError, match="item 10 of a was answered by one model alone"):
        answer_pairs(teacher[:2], student)
    with pytest.raises(EvaluationError, match="twice"):
        answer_pairs(teacher, [*student, row("a", "1", "again")])


def test_models_of_other_kinds_are_refused(directory: Path, tmp_path: Path) -> None:
    check_embedder(directory)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM, which is not an encoder.*mean pooling"):
        check_embedder(make_model(tmp_path / "causal"))
    with pytest.raises(ModelError, match=r"another pooling than mean or CLS: max"):
        check_embedder(make_embedder(tmp_path / "max", pooling="max"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_embedder(tmp_path / "empty")


def copied(directory: Path, folder: Path) -> Path:
    shutil.copytree(directory, folder / "copy")
    return folder / "copy"


def test_damaged_models_are_refused(directory: Path, tmp_path: Path) -> None:
    copy = copied(directory, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        check_embedder(copy)
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no safetensors"):
        check_embedder(copy)


def test_a_head_of_another_shape_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = copied(directory, tmp_path)
    modules = json.loads((copy / "modules.json").read_text(encoding="utf-8"))
    modules.append({"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (copy / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(ModelError, match="a module Dense"):
        check_embedder(copy)


def test_a_tokenizer_that_fits_is_needed(directory: Path, tmp_path: Path) -> None:
    copy = copied(directory, tmp_path)
    make_tokenizer(copy, vocab_size=200)
    with pytest.raises(ModelError, match=r"the tokenizer has \d+ entries, the embedding table 128 rows"):
        check_embedder(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        check_embedder(copy)


def test_every_weight_that_is_used_is_loaded(directory: Path, tmp_path: Path) -> None:
    copy = copied(directory, tmp_path)
    weights = load_file(copy / "model.safetensors")
    pooler = {name: weight for name, weight in weights.items() if not name.startswith("pooler")}
    save_file(pooler, copy / "model.safetensors", {"format": "pt"})
    vectors_ND, _ = embed(load_embedder(copy), ["it is 4"])
    np.testing.assert_allclose(vectors_ND[0].numpy(), by_hand(directory, "it is 4"), atol=1e-5)
    lost = next(name for name in pooler if "layer.1.output" in name)
    save_file({name: weight for name, weight in pooler.items() if name != lost}, copy / "model.safetensors")
    with pytest.raises(ModelError, match="was not loaded"):
        load_embedder(copy)


def test_positions_that_begin_behind_padding_are_not_counted(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    embedder = load_embedder(tmp_path)
    assert embedder.max_tokens == 32
    embed(embedder, ["How many apples are left? " * 20, "7"])  # one more would be out of the table
