"""Stage `select`: conditional selection. Keep a rewrite when its answer checks, else the reference, and say why."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sdft_ray.data.example import SELECTED_SCHEMA
from sdft_ray.stages import files
from sdft_ray.stages.job import Job, Made, Meter


def run(job: Job) -> Made:
    """One light task: answer checks are text, and take microseconds a row."""
    return ray.get(ray.remote(_select).options(num_cpus=0.2, max_retries=3).remote(job))


def _select(job: Job) -> Made:
    from sdft_ray.generation.selection import select

    made = Made()
    with Meter() as meter, job.output(made) as directory:
        seed = pq.read_table(job.input("seed") / files.ROWS).to_pylist()
        generated = pq.read_table(job.input("generate") / files.GENERATED).to_pylist()
        by_id = {row["example_id"]: row for row in generated}
        assert len(by_id) == len(generated) == len(seed), "one generated row per seed row"
        chosen = []
        for done, row in enumerate(seed, 1):
            answer = by_id[row["example_id"]]
            verdict = select(
                instruction=row["instruction"],
                reference=row["reference_response"],
                distilled=answer["response"],
                finish_reason=answer["finish_reason"],
                answer_kind=row["answer_kind"],
            )
            chosen.append(
                {
                    **row,
                    "distilled_response": answer["response"],
                    "response": verdict.response,
                    "source": verdict.source,
                    "reason": verdict.reason,
                }
            )
            if done % 1000 == 0:
                job.progress(done, len(seed), "rows")
        job.progress(len(seed), len(seed), "rows")
        pq.write_table(pa.Table.from_pylist(chosen, schema=SELECTED_SCHEMA), directory / files.DISTILLED)
        made.summary = {
            "num_rows": len(chosen),
            "reasons": dict(Counter(row["reason"] for row in chosen).most_common()),
            "kept_distilled": sum(row["source"] == "distilled" for row in chosen),
        }
    made.usage = meter.usage()
    return made
