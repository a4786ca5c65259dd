"""Part of stages `train` and `correct`: the rows of one training, tokenized and packed once per shared disk.

Beside `packed.arrow` lie what became of rows that did not fit and the ids of all, so that a message can name them.
Held-out rows have files of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from sdft_ray.errors import DataError
from sdft_ray.stages.cached import SignalDocuments, signal_documents
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.views import train_view, trial_view
from sdft_ray.store import files
from sdft_ray.store.atomic import replacing

if TYPE_CHECKING:
    from sdft_ray.data.packing import Document, PackedRows


@dataclass(frozen=True)
class TrainingRows:
    """`counts` is for the summary: rows dropped or cut because they were long, and whose signals were found."""

    rows: PackedRows
    counts: dict[str, Any]
    path: Path

    def name_of(self, document: int) -> str:
        """The `example_id` of a packed document."""
        return pq.read_table(_ids(self.path))["example_id"][document].as_py()


def training_rows(job: StageContext, *, held_out: bool = False) -> TrainingRows:
    """Pack, or map what another process has packed. Raises `DataError` when nothing is left to pack."""
    from sdft_ray.data.packing import PackedRows, pack

    path = job.work() / ("held_out.arrow" if held_out else "packed.arrow")
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            if trial_view(job.step).objective.cached and not held_out:
                encoded = signal_documents(job)
                documents, ids, counts = encoded.documents, encoded.example_ids, _with_signals(encoded)
            else:
                documents, ids, counts = _documents(job, held_out=held_out)
            if not any(documents):
                raise DataError(
                    f"{job.step.name}: none of its {len(documents):,} rows can be trained on, and "
                    f"{counts['num_dropped']:,} have over {train_view(job.step).max_seq_len:,} tokens",
                    "raise train.max_seq_len, or give shorter rows",
                )
            pq.write_table(pa.table({"example_id": pa.array(ids, pa.string())}), _ids(path))
            path.with_suffix(".json").write_text(json.dumps(counts), encoding="utf-8")
            with replacing(path) as partial:  # the last of the three: where it is, all are
                pack(documents, train_view(job.step).max_seq_len).save(partial)
    counts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return TrainingRows(PackedRows.load(path), counts, path)


def _ids(path: Path) -> Path:
    return path.with_suffix(".parquet")


def _documents(job: StageContext, *, held_out: bool) -> tuple[list[Document | None], list[str], dict[str, Any]]:
    """The documents of a training that reads texts, their ids, and counts."""
    from sdft_ray.data.chat import ChatFormat, load_tokenizer
    from sdft_ray.data.documents import training_documents
    from sdft_ray.data.held_out import part
    from sdft_ray.data.messages import prompt_of
    from sdft_ray.data.subset import nested_subset

    asked, trial = train_view(job.step), trial_view(job.step)
    distilled = trial.data == "distilled"
    response = "response" if distilled else "reference_response"
    source = job.input("data") / (files.DISTILLED if distilled else files.ROWS)
    table = pq.read_table(source, columns=["example_id", "instruction", "context", response])
    if distilled and not pq.read_table(source, columns=["source"], filters=[("source", "=", "distilled")]).num_rows:
        raise DataError(
            f"{job.step.name} is to be trained on rewrites, but selection kept none of {table.num_rows:,}",
            "the summary of select counts the reasons; change generate or seed_set.answer_kind",
        )
    if asked.validation_fraction:
        table = part(table, asked.validation_fraction, held_out=held_out)
    if trial.num_rows is not None and not held_out:
        ids = table["example_id"].to_pylist()
        chosen = nested_subset(ids, trial.num_rows)
        table = table.filter(pa.array([name in chosen for name in ids]))
    chat = ChatFormat(load_tokenizer(job.model("pruned")), job.teacher.chat_settings)
    prompts = map(prompt_of, table["instruction"].to_pylist(), table["context"].to_pylist())
    conversations = zip(prompts, table[response].to_pylist(), strict=True)
    encoded = training_documents(chat, conversations, asked.max_seq_len, asked.long_examples)
    counts = {"num_dropped": len(encoded.dropped), "num_cut": len(encoded.cut)}
    return encoded.documents, table["example_id"].to_pylist(), counts


def _with_signals(encoded: SignalDocuments) -> dict[str, Any]:
    return {"num_dropped": encoded.num_dropped, "num_cut": encoded.num_cut, "signals": encoded.counts}
