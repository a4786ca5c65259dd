"""Part of stage `train`: arms that read what generation kept of the teacher, in place of asking it.

Documents of such an arm are made of the tokens that the teacher sampled: signals speak of those, and tokenizing the
text again may give others. A row has no signals where selection kept the reference, where the teacher wrote control
tokens inside its response (its text hides them), and where its own tokens do not fit a packed row. Such a row trains
on its selected text by cross-entropy alone; where that has weight 0 it is left out, and counted in the summary.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from sdft_ray.errors import DataError
from sdft_ray.stages import files
from sdft_ray.stages.job import Job
from sdft_ray.stages.select import Answers

if TYPE_CHECKING:
    from sdft_ray.data.chat import ChatFormat
    from sdft_ray.data.packing import Document, PackedRows
    from sdft_ray.data.signals import Signals
    from sdft_ray.recipe import Objective
    from sdft_ray.training.cached import CachedTeacher

_FOLDER = "signals"
_COUNTS = "signals.json"
_ROWS_AT_A_TIME = 16  # their hidden states may be large

_Place = tuple[str, int]
"""A sample: `example_id` and `sample_index`."""


def cached_teacher(job: Job, rows: PackedRows) -> CachedTeacher | None:
    """What generation kept of the teacher, where the arm's objective reads it. `rows` come from `pack_with_signals`."""
    products = _objective(job).cached.values()
    if not products:
        return None
    from sdft_ray.data.signal_rows import SignalRows
    from sdft_ray.models.head import load_head
    from sdft_ray.training.cached import CachedTeacher

    signals = SignalRows.load(job.work() / _FOLDER)
    if "hidden_states" not in products:
        return CachedTeacher(rows, signals)
    head, softcap = load_head(job.model("teacher"), job.recipe.teacher.dtype)
    return CachedTeacher(rows, signals, head.to("cuda" if job.resources.train.gpus else "cpu"), softcap)


def signal_counts(job: Job) -> dict[str, Any]:
    """For the summary of an arm that reads signals: how many rows have them, and why others have not."""
    if not _objective(job).cached:
        return {}
    return {"signals": json.loads((job.work() / _COUNTS).read_text(encoding="utf-8"))}


def pack_with_signals(job: Job, path: Path) -> None:
    """Pack the arm's documents into `path`, after their signals are in place beside it: `path` makes both whole.

    Raises `DataError` if no row has signals.
    """
    from sdft_ray.data.packing import pack

    documents, samples, counts = _documents(job)
    if not samples:
        raise DataError(
            f"arm {job.arm} reads cached signals and no row has any: {counts['without']}",
            "see why in the summary of select; raise generate.num_samples or max_tokens, or leave the arm out",
        )
    lengths = [0] * len(documents)
    for document in samples.values():
        lengths[document] = sum(documents[document].loss_mask)
    folder = job.work() / _FOLDER
    for old in (folder, folder.with_suffix(".partial")):
        shutil.rmtree(old, ignore_errors=True)
    _write_signals(job, folder.with_suffix(".partial"), samples, lengths)
    folder.with_suffix(".partial").rename(folder)
    (job.work() / _COUNTS).write_text(json.dumps(counts), encoding="utf-8")
    partial = path.with_suffix(".partial")
    pack(documents, job.recipe.train.row_tokens).save(partial)
    partial.rename(path)


def _objective(job: Job) -> Objective:
    return job.recipe.train.arms[job.arm].objective


def _documents(job: Job) -> tuple[list[Document], dict[_Place, int], dict[str, Any]]:
    """What is trained on, the samples whose signals are, each with its place among the documents, and counts."""
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.generation.selection import kept_sample

    chat = ChatFormat(load_tokenizer(job.input("pruned")))
    answers = Answers(job.input("generate"), ["sample_index", "response_ids"])
    documents: list[Document] = []
    samples: dict[_Place, int] = {}
    without: Counter[str] = Counter()
    for row in _selected(job):
        sample = kept_sample(row, answers.of(row["example_id"]))
        document, why = _sampled_document(chat, row, sample, job.recipe.train.row_tokens)
        if sample is not None and document is not None:
            samples[row["example_id"], sample["sample_index"]] = len(documents)
            documents.append(document)
            continue
        without[why] += 1
        if _objective(job).cross_entropy:
            documents.append(chat.encode(row["instruction"], row["response"]))
    left_out = len(samples) + without.total() - len(documents)
    counts = {"num_rows": len(samples), "without": dict(without.most_common()), "num_left_out": left_out}
    return documents, samples, counts


def _sampled_document(
    chat: ChatFormat, row: Mapping[str, Any], sample: Mapping[str, Any] | None, row_tokens: int
) -> tuple[Document | None, str]:
    """A document of the tokens that the teacher sampled, or None and why there is none."""
    if sample is None:
        return None, "reference"
    if chat.writes_control_tokens(sample["response_ids"]):
        return None, "control_tokens"
    document = chat.encode_sampled(row["instruction"], sample["response_ids"])
    return (document, "") if len(document.ids) <= row_tokens else (None, "too_long")


def _selected(job: Job) -> Iterator[dict[str, Any]]:
    columns = ["example_id", "instruction", "response", "distilled_response", "source"]
    for batch in pq.ParquetFile(job.input("data") / files.DISTILLED).iter_batches(columns=columns):
        yield from batch.to_pylist()


def _write_signals(job: Job, folder: Path, samples: Mapping[_Place, int], lengths: list[int]) -> None:
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
