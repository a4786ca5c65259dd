"""Semantic similarity of two models' answers: the cosine between sentence embeddings.

The embedding of a text is the mean of the last hidden states over its tokens, special tokens included, or the state of
its first token, scaled to length 1: mean and CLS pooling of Sentence-BERT (arXiv:1908.10084, section 3). The files of
sentence-transformers beside a model say which one it was trained for; without them it is the mean. Other poolings and
further layers are refused. Texts longer than the model's maximum length are truncated at their end, and counted.

The embeddings equal those of the sentence-transformers package bit for bit (tests). The package itself is not used
here: it loads a model with missing weights, or a causal language model, without an error (docs/libraries.md).

An empty answer is embedded like any other text, from the special tokens alone: two empty answers have similarity 1,
and an empty and a non-empty one whatever similarity the model gives them.

Suffixes: B texts of a batch, T tokens, D channels, N texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from sdft_ray.errors import EvaluationError, ModelError
from sdft_ray.evaluation.forgetting import Likeness
from sdft_ray.models.loading import quiet
from sdft_ray.models.vocabulary import check_vocabulary
from sdft_ray.statistics.estimate import Estimate

LOW_QUANTILE = 0.05
_MODULES = {"Transformer", "Pooling", "Normalize"}
"""The modules of sentence-transformers that are applied here."""
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
_HINT = "give an encoder of sentence embeddings with mean pooling, such as sentence-transformers/all-MiniLM-L6-v2"

Pooling = Literal["mean", "cls"]


class Pair(NamedTuple):
    """The answers of teacher and student to one item."""

    task: str
    item: str
    teacher: str
    student: str


@dataclass(frozen=True)
class Embedder:
    """A model in eval mode, its tokenizer, its maximum length in tokens, and its pooling."""

    model: Any
    tokenizer: Any
    max_tokens: int
    pooling: Pooling = "mean"


def check_embedder(directory: Path) -> None:
    """Raise `ModelError` unless `load_embedder` can load `directory`. Reads no weights."""
    config = _config(directory)
    names = getattr(config, "architectures", None) or [""]
    if getattr(config, "is_encoder_decoder", False) or names[0].endswith("ForCausalLM"):
        raise ModelError(f"{directory} is a {names[0] or config.model_type}, which is not an encoder", _HINT)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no safetensors", _HINT)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as reason:
            raise ModelError(f"cannot read {file}: {reason}", "copy that file again") from None
    _pooling(directory)
    _tokenizer(directory)
    check_vocabulary(directory, config.vocab_size)


def _config(directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json, so it is not an embedding model", _HINT)
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as reason:
        raise ModelError(f"{directory} is not an embedding model: {str(reason).splitlines()[0]}", _HINT) from None


def _tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in _VOCABULARIES):  # transformers would create an empty one
        raise ModelError(f"{directory} holds no tokenizer", _HINT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as reason:
        raise ModelError(f"no tokenizer can be loaded from {directory}: {str(reason).splitlines()[0]}", _HINT) from None
    if not tokenizer("")["input_ids"]:
        raise ModelError(f"the tokenizer in {directory} adds no special token: an empty text has no embedding", _HINT)
    return tokenizer


def _pooling(directory: Path) -> Pooling:
    """The pooling named in the files of sentence-transformers; the mean without such files. Raises `ModelError`."""
    paths = {
        str(module.get("type", "")).rpartition(".")[2]: directory / str(module.get("path", ""))
        for module in _json(directory / "modules.json", [])
    }
    others = [name for name in paths if name not in _MODULES]
    if others:
        raise ModelError(f"{directory} was trained with a module {others[0]}, which is not applied here", _HINT)
    config = _json(paths["Pooling"] / "config.json", {}) if "Pooling" in paths else {}
    names = {name.removeprefix("pooling_mode_") for name, value in config.items() if value is True}
    if "pooling_mode" in config:  # since version 6; before, one flag per mode
        names |= {config["pooling_mode"]} if isinstance(config["pooling_mode"], str) else {*config["pooling_mode"]}
    modes = {name.removesuffix("_tokens").removesuffix("_token") for name in names - {"include_prompt"}}
    if modes <= {"mean"}:
        return "mean"
    if modes == {"cls"}:
        return "cls"
    raise ModelError(f"{directory} was trained for another pooling than mean or CLS: {', '.join(sorted(modes))}", _HINT)


def _json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise ModelError(f"cannot read {path}: {reason}", "restore the file") from None


def load_embedder(directory: Path, device: str = "cpu") -> Embedder:
    """Load the model in a directory, in float32: safetensors only, local files only, no remote code.

    Raises `ModelError`, also if a weight that is used is missing and would keep its initial value.
    """
    check_embedder(directory)
    with quiet():
        loaded: Any = AutoModel.from_pretrained(
            str(directory),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, report = loaded
    # Hidden states are taken before BERT's pooler, and such models are often saved without it.
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    unset = sorted(missing | set(report["mismatched_keys"]))
    if unset:
        raise ModelError(f"{directory}: {unset[0]} was not loaded", "config.json and weights must fit each other")
    tokenizer = _tokenizer(directory)
    max_seq_length = _json(directory / "sentence_bert_config.json", {}).get("max_seq_length") or 1 << 30
    max_tokens = min(tokenizer.model_max_length, _num_positions(model), max_seq_length)
    return Embedder(model.to(device).eval(), tokenizer, max_tokens, _pooling(directory))


def _num_positions(model: Any) -> int:
    """The number of learned positions that tokens can use; RoBERTa's begin after the padding index."""
    count = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == count and module.padding_idx is not None:
            return count - module.padding_idx - 1
    return count


def answer_pairs(teacher: Sequence[Mapping[str, str]], student: Sequence[Mapping[str, str]]) -> list[Pair]:
    """Rows of `task`, `item` and `response`, joined by the first two, in the teacher's order.

    Raises `EvaluationError` for an item that only one model answered, or that one model answered twice.
    """
    by_teacher, by_student = (
        {(row["task"], row["item"]): row["response"] for row in rows} for rows in (teacher, student)
    )
    if len(by_teacher) < len(teacher) or len(by_student) < len(student):
        raise EvaluationError("an item was answered twice", "give every item of a task its own id")
    if stray := by_teacher.keys() ^ by_student.keys():
        task, item = min(stray)
        raise EvaluationError(
            f"item {item} of {task} was answered by one model alone", "evaluate both on the same items"
        )
    return [Pair(task, item, response, by_student[task, item]) for (task, item), response in by_teacher.items()]


def likeness(
    embedder: Embedder,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Likeness, list[float]]:
    """The summary over all pairs, and the similarity of each pair. `on_batch` as in `embed`."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.teacher, pair.student)))
    vectors_ND, cut = embed(embedder, texts, batch_tokens=batch_tokens, on_batch=on_batch)
    index_of = {text: index for index, text in enumerate(texts)}
    first = [index_of[pair.teacher] for pair in pairs]
    second = [index_of[pair.student] for pair in pairs]
    values_N = (vectors_ND[first] * vectors_ND[second]).sum(-1).clamp(-1.0, 1.0).double()
    count = len(pairs)
    stderr = float(values_N.std(correction=1)) / count**0.5 if count > 1 else None
    summary = Likeness(
        num_answers=count,
        mean=Estimate(float(values_N.mean()) if count else None, stderr),
        low=float(values_N.quantile(LOW_QUANTILE)) if count else None,
        num_empty=sum(not pair.teacher.strip() or not pair.student.strip() for pair in pairs),
        num_cut=sum(a in cut or b in cut for a, b in zip(first, second, strict=True)),
    )
    return summary, values_N.tolist()


@torch.inference_mode()
def embed(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, set[int]]:
    """Embeddings of shape (N, D), float32 on the CPU, of length 1, and the indices of the truncated texts.

    A batch holds at most `batch_tokens` positions, padding included, but at least one text. `on_batch` is called with
    (texts done, number of texts). The split into batches does not change the result beyond rounding.
    """
    limit = embedder.max_tokens
    ids = [embedder.tokenizer(text, truncation=True, max_length=limit + 1)["input_ids"] for text in texts]
    cut = {index for index, text_ids in enumerate(ids) if len(text_ids) > limit}
    for index in cut:
        ids[index] = embedder.tokenizer(texts[index], truncation=True, max_length=limit)["input_ids"]
    vectors_ND = torch.zeros(len(texts), embedder.model.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    done = 0
    while done < len(order):
        batch = order[done : done + 1]
        while done + len(batch) < len(order) and (len(batch) + 1) * len(ids[order[done + len(batch)]]) <= batch_tokens:
            batch.append(order[done + len(batch)])
        vectors_ND[batch] = _embeddings(embedder, [ids[index] for index in batch])
        done += len(batch)
        if on_batch is not None:
            on_batch(done, len(order))
    if not bool(torch.isfinite(vectors_ND).all()):
        raise ModelError("the embedding model gives vectors that are not finite", "check its weights")
    return vectors_ND, cut


def _embeddings(embedder: Embedder, ids: Sequence[Sequence[int]]) -> Tensor:
    """The texts of one batch: shape (B, D)."""
    model, width = embedder.model, max(map(len, ids))
    ids_BT = torch.full((len(ids), width), getattr(model.config, "pad_token_id", None) or 0, dtype=torch.int64)
    mask_BT = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, text_ids in enumerate(ids):
        ids_BT[row, : len(text_ids)] = torch.tensor(text_ids)
        mask_BT[row, : len(text_ids)] = 1
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
    weight_BT1 = mask_BT[..., None].float()
    mean_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
    pooled_BD = hidden_BTD[:, 0] if embedder.pooling == "cls" else mean_BD
    return torch.nn.functional.normalize(pooled_BD, dim=-1).cpu()
