"""How alike two models' answers are in meaning: the cosine between sentence embeddings.

A text's embedding is the mean of the last hidden states over its tokens, special ones included, scaled to length 1:
mean pooling as in Sentence-BERT (arXiv:1908.10084, section 3), which most models of sentence embeddings are trained
for. A model that was trained for another pooling says so in its files, and is refused. Texts longer than the model
reads are cut at their end, and counted.

An empty answer is embedded like any other text, from the special tokens alone: two empty answers are alike (1), and
an empty and a written one have the similarity that the model gives them.

Suffixes: B texts of a batch, T tokens, D channels, N texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from sdft_ray.errors import EvaluationError, ModelError
from sdft_ray.evaluation.recovery import Estimate
from sdft_ray.models.loading import quiet
from sdft_ray.models.vocabulary import check_vocabulary

LOW_QUANTILE = 0.05
_MODULES = {"Transformer", "Pooling", "Normalize"}
"""What sentence-transformers lists for models of this recipe."""
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
_HINT = "give an encoder of sentence embeddings with mean pooling, such as sentence-transformers/all-MiniLM-L6-v2"


class Pair(NamedTuple):
    """The answers of teacher and student to one item."""

    task: str
    item: str
    teacher: str
    student: str


@dataclass(frozen=True)
class Likeness:
    """Cosines in [-1, 1] over `num_answers` pairs: their mean, and the value that 5 % of them do not exceed.

    `low` is None without pairs. `num_empty` pairs have at least one empty answer, `num_cut` one that was cut.
    """

    num_answers: int
    mean: Estimate
    low: float | None
    num_empty: int
    num_cut: int


@dataclass(frozen=True)
class Embedder:
    """A model in eval mode, its tokenizer, and how many tokens it reads."""

    model: Any
    tokenizer: Any
    max_tokens: int


def check_embedder(directory: Path) -> None:
    """Raises `ModelError` unless a directory holds what `load_embedder` wants. Reads no weights."""
    config = _config(directory)
    names = getattr(config, "architectures", None) or [""]
    if getattr(config, "is_encoder_decoder", False) or names[0].endswith("ForCausalLM"):
        raise ModelError(f"{directory} holds a {names[0] or config.model_type}, which is no encoder", _HINT)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no safetensors", _HINT)
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except SafetensorError as reason:
            raise ModelError(f"cannot read {file}: {reason}", "copy that file again") from None
    _check_pooling(directory)
    _tokenizer(directory)
    check_vocabulary(directory, config.vocab_size)


def _config(directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no config.json, so it is no embedding model", _HINT)
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as reason:
        raise ModelError(f"{directory} is no embedding model: {str(reason).splitlines()[0]}", _HINT) from None


def _tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in _VOCABULARIES):  # transformers would make one without words
        raise ModelError(f"{directory} holds no tokenizer", _HINT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as reason:
        raise ModelError(f"no tokenizer can be loaded from {directory}: {str(reason).splitlines()[0]}", _HINT) from None
    if not tokenizer("")["input_ids"]:
        raise ModelError(f"the tokenizer in {directory} gives an empty text no token, so it has no embedding", _HINT)
    return tokenizer


def _check_pooling(directory: Path) -> None:
    """Against the files of sentence-transformers, where there are any."""
    listed = _json(directory / "modules.json", [])
    modules = [str(module.get("type", "")).rpartition(".")[2] for module in listed]
    other = [name for name in modules if name not in _MODULES]
    if other:
        raise ModelError(f"{directory} was trained with a module {other[0]}, which is not applied here", _HINT)
    for module in listed:
        pooling = _json(directory / str(module.get("path", "")) / "config.json", {})
        modes = {name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True}
        modes = {pooling.get("pooling_mode", "mean_tokens"), *modes} - {"include_prompt", "mean", "mean_tokens"}
        if str(module.get("type", "")).endswith(".Pooling") and modes:
            raise ModelError(f"{directory} was trained for another pooling than the mean over tokens", _HINT)


def _json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise ModelError(f"cannot read {path}: {reason}", "restore the file") from None


def load_embedder(directory: Path, device: str = "cpu") -> Embedder:
    """The model in a directory, in float32: safetensors only, local files only, no remote code.

    Raises `ModelError`, also when a weight that is used would be left at its initial value.
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
    # Hidden states are taken before BERT's pooler, which models of this kind are often saved without.
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    unset = sorted(missing | set(report["mismatched_keys"]))
    if unset:
        raise ModelError(f"{directory}: {unset[0]} was not loaded", "config.json and weights must fit each other")
    tokenizer = _tokenizer(directory)
    told = _json(directory / "sentence_bert_config.json", {}).get("max_seq_length") or 1 << 30
    return Embedder(model.to(device).eval(), tokenizer, min(tokenizer.model_max_length, _num_positions(model), told))


def _num_positions(model: Any) -> int:
    """Tokens that learned positions are there for; RoBERTa's begin after the id of padding."""
    count = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == count and module.padding_idx is not None:
            return count - module.padding_idx - 1
    return count


def answer_pairs(teacher: Sequence[Mapping[str, str]], student: Sequence[Mapping[str, str]]) -> list[Pair]:
    """Rows of `task`, `item` and `response`, joined by the first two, in the teacher's order.

    Raises `EvaluationError` for an item that only one of them answered, or one twice.
    """
    theirs, own = ({(row["task"], row["item"]): row["response"] for row in rows} for rows in (teacher, student))
    if len(theirs) < len(teacher) or len(own) < len(student):
        raise EvaluationError("an item was answered twice", "give tasks whose items have names of their own")
    if stray := theirs.keys() ^ own.keys():
        task, item = min(stray)
        raise EvaluationError(
            f"item {item} of {task} was answered by one model alone", "evaluate both on the same items"
        )
    return [Pair(task, item, response, own[task, item]) for (task, item), response in theirs.items()]


def likeness(
    embedder: Embedder,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Likeness, list[float]]:
    """The similarity of every pair, and what they say together. `on_batch` as in `embed`."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.teacher, pair.student)))
    vectors_ND, cut = embed(embedder, texts, batch_tokens=batch_tokens, on_batch=on_batch)
    place = {text: index for index, text in enumerate(texts)}
    first = [place[pair.teacher] for pair in pairs]
    second = [place[pair.student] for pair in pairs]
    values_N = (vectors_ND[first] * vectors_ND[second]).sum(-1).clamp(-1.0, 1.0).double()
    count = len(pairs)
    stderr = float(values_N.std(correction=1)) / count**0.5 if count > 1 else None
    found = Likeness(
        num_answers=count,
        mean=Estimate(float(values_N.mean()) if count else None, stderr),
        low=float(values_N.quantile(LOW_QUANTILE)) if count else None,
        num_empty=sum(not pair.teacher.strip() or not pair.student.strip() for pair in pairs),
        num_cut=sum(a in cut or b in cut for a, b in zip(first, second, strict=True)),
    )
    return found, values_N.tolist()


@torch.inference_mode()
def embed(
    embedder: Embedder,
    texts: Sequence[str],
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, set[int]]:
    """Embeddings of shape (N, D), float32 on the CPU, of length 1, and the places of the texts that were cut.

    A batch holds at most `batch_tokens` positions, pads included, but always one text. `on_batch` is called with
    (texts done, texts in all). The batch does not matter beyond rounding.
    """
    most = embedder.max_tokens
    ids = [embedder.tokenizer(text, truncation=True, max_length=most + 1)["input_ids"] for text in texts]
    cut = {index for index, own in enumerate(ids) if len(own) > most}
    for index in cut:
        ids[index] = embedder.tokenizer(texts[index], truncation=True, max_length=most)["input_ids"]
    vectors_ND = torch.zeros(len(texts), embedder.model.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    done = 0
    while done < len(order):
        batch = order[done : done + 1]
        while done + len(batch) < len(order) and (len(batch) + 1) * len(ids[order[done + len(batch)]]) <= batch_tokens:
            batch.append(order[done + len(batch)])
        vectors_ND[batch] = _pooled(embedder.model, [ids[index] for index in batch])
        done += len(batch)
        if on_batch is not None:
            on_batch(done, len(order))
    if not bool(torch.isfinite(vectors_ND).all()):
        raise ModelError("the embedding model gives vectors that are not finite", "check its weights")
    return vectors_ND, cut


def _pooled(model: Any, ids: Sequence[Sequence[int]]) -> Tensor:
    """Mean over the tokens of each text, scaled to length 1: shape (B, D)."""
    width = max(map(len, ids))
    ids_BT = torch.full((len(ids), width), getattr(model.config, "pad_token_id", None) or 0, dtype=torch.int64)
    mask_BT = torch.zeros(len(ids), width, dtype=torch.int64)
    for row, own in enumerate(ids):
        ids_BT[row, : len(own)] = torch.tensor(own)
        mask_BT[row, : len(own)] = 1
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
    weight_BT1 = mask_BT[..., None].float()
    mean_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=-1).cpu()
