"""Where the files of a step lie that ran on its own, so that nobody has committed it."""

from __future__ import annotations

from pathlib import Path

from sdft_ray.stages.job import StageContext, StageResult
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import MANIFEST, Store


def output_of(job: StageContext) -> Path:
    """The artifact if it is committed, else what was staged last, of a job in a local store."""
    store = Store(job.store_url)
    committed = Path(store.url) / job.address
    if (committed / MANIFEST).exists():
        return committed
    staged = store.work(job.address).glob("placed-*")
    return max(staged, key=lambda path: path.stat().st_mtime_ns)


def commit_output(job: StageContext, made: StageResult) -> Path:
    """Commit what a step has staged, as the scheduler does; where it lies."""
    stage = job.address.split("/")[0]
    store = Store(job.store_url)
    store.commit(Manifest(stage, stage, job.address, "0" * 64, "{}", {}, made.files, Usage(), made.summary))
    return store.path(job.address)
