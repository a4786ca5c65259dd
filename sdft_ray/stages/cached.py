"""Part of stage `train`: arms that read what generation kept of the teacher, in place of asking it.

Documents of such an arm are made of the tokens that the teacher sampled: signals speak of those, and tokenizing the
text again may give others. A row has no signals where selection kept the reference, where the teacher wrote control
tokens inside its response (its text hides them), and where its own tokens do not fit a packed row. Such a row trains
on its selected text by cross-entropy alone; where that has weight 0 it is left out, and counted in the summary.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from sdft_ray.data.messages import row_prompt
from sdft_ray.errors import DataError
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.select import Answers
from sdft_ray.stages.views import train_view, trial_view
from sdft_ray.store import files

if TYPE_CHECKING:
    from sdft_ray.data.chat import ChatFormat
    from sdft_ray.data.packing import Document, PackedRows
    from sdft_ray.data.signals import Signals
    from sdft_ray.recipe.arms import Objective
    from sdft_ray.training.cached import CachedTeacher

_FOLDER = "signals"
_ROWS_AT_A_TIME = 16  # their hidden states may be large

_Place = tuple[str, int]
"""A sample: `example_id` and `sample_index`."""


def cached_teacher(job: StageContext, rows: PackedRows) -> CachedTeacher | None:
    """What generation kept of the teacher, where the arm's objective reads it. `rows` hold `signal_documents`."""
    products = _objective(job).cached.values()
    if not products:
        return None
    from sdft_ray.data.signal_rows import SignalRows
    from sdft_ray.models.head import load_head
    from sdft_ray.training.cached import CachedTeacher

    signals = SignalRows.load(job.work() / _FOLDER)
    if "hidden_states" not in products:
        return CachedTeacher(rows, signals)
    head, softcap = load_head(job.model("teacher"), job.teacher.dtype)
    return CachedTeacher(rows, signals, head.to("cuda" if job.resources.train.gpus else "cpu"), softcap)


@dataclass(frozen=True)
class SignalDocuments:
    """What an arm that reads signals is trained on: a document or None per row, in order, and counts."""

    documents: list[Document | None]
    example_ids: list[str]
    counts: dict[str, Any]
    num_dropped: int
    num_cut: int


def signal_documents(job: StageContext) -> SignalDocuments:
    """Documents whose signals are in place in the work directory. Raises `DataError` if no row has signals."""
    encoded, samples = _documents(job)
    if not samples:
        raise DataError(
            f"arm {job.step.label} needs cached signals, but no row has any: {encoded.counts['without']}",
            "the summary of select says why; raise generate.num_samples or max_tokens, or remove the arm",
        )
    lengths = [0] * len(encoded.documents)
    for place in samples.values():
        document = encoded.documents[place]
        assert document is not None, "a row with signals is trained on"
        lengths[place] = sum(document.loss_mask)
    folder = job.work() / _FOLDER
    for old in (folder, folder.with_suffix(".partial")):
        shutil.rmtree(old, ignore_errors=True)
    _write_signals(job, folder.with_suffix(".partial"), samples, lengths)
    folder.with_suffix(".partial").rename(folder)
    return encoded


def _objective(job: StageContext) -> Objective:
    return trial_view(job.step).objective


def _documents(job: StageContext) -> tuple[SignalDocuments, dict[_Place, int]]:
    """What is trained on, and the samples whose signals are, each with its place among the documents."""
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.data.documents import Documents, add_document
    from sdft_ray.generation.selection import selected_sample

    asked = train_view(job.step)
    chat = ChatFormat(load_tokenizer(job.model("pruned")), job.teacher.chat_settings)
    answers = Answers(job.input("generate"), ["sample_index", "response_ids"])
    encoded = Documents()
    example_ids: list[str] = []
    samples: dict[_Place, int] = {}
    without: Counter[str] = Counter()
    chosen = _trained_on(job)
    for row in _selected(job):
        sample = selected_sample(row, answers.of(row["example_id"]))
        if row["example_id"] not in chosen:
            continue
        example_ids.append(row["example_id"])
        document, why = _sampled_document(chat, row, sample, asked.max_seq_len)
        if sample is not None and document is not None:
            samples[row["example_id"], sample["sample_index"]] = len(encoded.documents)
            encoded.documents.append(document)
            continue
        without[why] += 1
        if _objective(job).cross_entropy:
            add_document(encoded, chat, (row_prompt(row), row["response"]), asked.max_seq_len, asked.long_examples)
        else:
            encoded.documents.append(None)
    left_out = 0 if _objective(job).cross_entropy else without.total()
    counts = {"num_rows": len(samples), "without": dict(without.most_common()), "num_left_out": left_out}
    return SignalDocuments(encoded.documents, example_ids, counts, len(encoded.dropped), len(encoded.cut)), samples


def _trained_on(job: StageContext) -> frozenset[str]:
    """Ids of the rows that are not held out, or of the part that the arm asks for."""
    from sdft_ray.data.held_out import is_held_out
    from sdft_ray.data.subset import nested_subset

    ids = pq.read_table(job.input("data") / files.DISTILLED, columns=["example_id"])["example_id"].to_pylist()
    fraction, num_rows = train_view(job.step).validation_fraction, trial_view(job.step).num_rows
    left = [name for name in ids if not is_held_out(name, fraction)]
    return frozenset(left) if num_rows is None else nested_subset(left, num_rows)


def _sampled_document(
    chat: ChatFormat, row: Mapping[str, Any], sample: Mapping[str, Any] | None, row_tokens: int
) -> tuple[Document | None, str]:
    """A document of the tokens that the teacher sampled, or None and why there is none."""
    if sample is None:
        return None, "reference"
    if chat.writes_control_tokens(sample["response_ids"]):
        return None, "control_tokens"
    document = chat.encode_sampled(row_prompt(row), sample["response_ids"])
    return (document, "") if len(document.ids) <= row_tokens else (None, "too_long")


def _selected(job: StageContext) -> Iterator[dict[str, Any]]:
    columns = ["example_id", "instruction", "context", "response", "distilled_response", "source"]
    for batch in pq.ParquetFile(job.input("data") / files.DISTILLED).iter_batches(columns=columns):
        yield from batch.to_pylist()


def _write_signals(job: StageContext, folder: Path, samples: Mapping[_Place, int], lengths: list[int]) -> None:
    """One pass over what generation wrote, a few rows in memory at a time; only what the objective reads is kept."""
    from sdft_ray.data.signal_rows import SignalWriter

    products = set(_objective(job).cached.values())
    columns = ["example_id", "sample_index", *(["hidden_states"] if "hidden_states" in products else [])]
    columns += ["top_ids", "top_logprobs"] if "top_logprobs" in products else []
    writer = SignalWriter(folder, lengths)
    for name in (files.GENERATED, files.FAILED):
        table = pq.ParquetFile(job.input("generate") / name)
        for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
            for record in batch.to_pylist():
                document = samples.get((record["example_id"], record["sample_index"]))
                if document is not None:
                    writer.put(document, _signals(record, lengths[document]))
    writer.close()


def _signals(record: Mapping[str, Any], num_tokens: int) -> Signals:
    from sdft_ray.data.signals import Signals, decode_hidden, decode_top

    top = decode_top(record["top_ids"], record["top_logprobs"]) if "top_ids" in record else None
    hidden_TD = decode_hidden(record["hidden_states"], num_tokens) if "hidden_states" in record else None
    return Signals(top, hidden_TD)
