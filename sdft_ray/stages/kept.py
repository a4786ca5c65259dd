"""Part of stage `generate`: a sample of the rows is answered first and judged as it comes.

The sample is drawn over the whole seed set, because its rows may be in any order. Judging is what `select` does, in a
task like that of `select`, so nothing is decided in two ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from sdft_ray.generation.chunks import CHUNK_ROWS, Ledger
from sdft_ray.generation.kept import Kept, chosen
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.rewriter import Rows, key_of, rows_at_a_time
from sdft_ray.stages.select import fitting
from sdft_ray.store import files

SAMPLE_ROWS = 1024
COLUMNS = ("row_key", "response", "finish_reason")
"""What is read of an answer."""


class KeptWatch:
    """Stops a generation of which too few rewrites will be kept. Does nothing where the step asks for no share."""

    def __init__(self, job: StageContext, ledger: Ledger, seed: int) -> None:
        self._min_share = job.resources.generate.min_kept if job.step.must_keep else 0.0
        # The sample's answers stay in memory when all are written out.
        num_rows = min(ledger.num_rows, rows_at_a_time(job, most=SAMPLE_ROWS)) if self._min_share else 0
        num_rows = num_rows if num_rows >= CHUNK_ROWS else 0  # too few to be sure of anything before the end
        self.drawn: NDArray[np.int32] = ledger.draw(num_rows, seed)
        self._job = job
        self._open: dict[bytes, dict[str, Any]] = {}
        if len(self.drawn):
            rows = Rows(job.input("seed") / files.ROWS).take(np.sort(self.drawn))
            self._open = {key_of(row): row for row in rows}
        self._num_looks = max(1, len(self.drawn) // CHUNK_ROWS)
        self._next_look = CHUNK_ROWS
        self._kept = Kept()

    @property
    def is_open(self) -> bool:
        """Whether rows of the sample are still to be judged."""
        return bool(self._open)

    def look(self, answers: pa.Table) -> None:
        """Judge the sample's rows that are among `answers`. Raises `DataError` when too few are surely kept."""
        samples: dict[bytes, list[dict[str, Any]]] = {}
        for answer in answers.select(COLUMNS).to_pylist():
            if answer["row_key"] in self._open:
                samples.setdefault(answer["row_key"], []).append(answer)
        rows = [(self._open.pop(key), own) for key, own in samples.items()]
        # A row that could not be sampled says nothing of the template; such rows have a limit of their own.
        rows = [(row, own) for row, own in rows if own[-1]["finish_reason"] != "error"]
        if not rows:
            return
        for row in ray.get(ray.remote(_judged).options(num_cpus=0, max_retries=3).remote(self._job, rows)):
            self._kept.add(row)
        if self._kept.num_rows >= self._next_look:
            self._next_look = self._kept.num_rows + CHUNK_ROWS
            self._kept.check_sample(self._min_share, self._num_looks)


def _judged(
    job: StageContext, rows: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
) -> list[dict[str, Any]]:
    """Id, rewrite and reason of each row with its samples."""
    fits = fitting(job, job.step.row_tokens)
    names = ("example_id", "distilled_response", "reason")
    return [{name: row[name] for name in names} for row in (chosen(row, own, fits) for row, own in rows)]
