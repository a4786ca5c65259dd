"""Stage `gap`: how far references and rewrites lie from the teacher, before anything is trained.

Rows are drawn at random until the gap is known well enough. `gap:pruned` asks the pruned model about the rows that
`gap` has drawn. `gap:corrected` asks teacher and corrected teacher, about held-out rows if there are any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import ray

from sdft_ray.recipe.recipe import Gap
from sdft_ray.stages.job import StageContext, StageResult, UsageMeter, remote_options
from sdft_ray.stages.seed_texts import TEXTS, kept_rows, scorer, text_documents
from sdft_ray.stages.views import view
from sdft_ray.statistics.estimate import plain
from sdft_ray.store import files

_ROWS_AT_ONCE = 64
"""Rows scored between two looks at the error; fewer would not give an error to rely on."""

Row = dict[str, Any]


def run(job: StageContext) -> StageResult:
    """One task, which holds one model at a time."""
    return ray.get(ray.remote(_gap).options(**remote_options(job.resources.gap), max_retries=3).remote(job))


def _gap(job: StageContext) -> StageResult:
    from sdft_ray.evaluation.correction import changes, correction_verdict
    from sdft_ray.evaluation.shift import shift, verdict

    result, scoring = StageResult(), _Scoring(job)
    with UsageMeter(gpus=job.resources.gap.gpus) as meter, job.output(result) as directory:
        kept = kept_rows(job)
        rows, is_enough = _rows_in_order(job, kept)
        for model in _models(job):
            rows = scoring.score(model, rows, is_enough) if rows else []
            is_enough = None  # the next model is asked about the same rows
        figures = shift(scoring.nll)
        result.summary = {"num_kept": len(kept), **plain(figures)}
        if "teacher" in _models(job):
            result.summary["verdict"] = verdict(figures)
        if job.step.subject == "corrected":
            moved = changes(scoring.nll)
            result.summary |= {
                "changes": {text: plain(change) for text, change in moved.items()},
                "verdict": correction_verdict(moved),
            }
        per_row = [
            {
                "example_id": row["example_id"],
                **{
                    model: {text: part[i]._asdict() for text, part in texts.items()}
                    for model, texts in scoring.nll.items()
                },
            }
            for i, row in enumerate(rows)
        ]
        (directory / files.GAP).write_text(json.dumps({**result.summary, "rows": per_row}), encoding="utf-8")
    result.usage = meter.usage(scoring.num_tokens)
    return result


def _models(job: StageContext) -> tuple[str, ...]:
    """Who is asked, in order."""
    return {"": ("teacher",), "pruned": ("pruned",), "corrected": ("teacher", "corrected")}[job.step.subject]


def _rows_in_order(job: StageContext, kept: Sequence[Row]) -> tuple[list[Row], float | None]:
    """The rows to score, and the standard error at which the first model may stop; None: all of them.

    The rows of `gap:pruned` are those that `gap` has scored.
    """
    from sdft_ray.data.subset import drawn

    if "gap" in job.inputs:
        by_name = {row["example_id"]: row for row in kept}
        scored = json.loads((job.input("gap") / files.GAP).read_text(encoding="utf-8"))["rows"]
        return [by_name[row["example_id"]] for row in scored], None
    # For a corrected teacher the slice names held-out rows: the others it has simply seen.
    asked = view(Gap, {k: v for k, v in job.slice.items() if k != "held_out"})
    order = drawn([row["example_id"] for row in kept])[: asked.num_rows]
    return [kept[position] for position in order], asked.max_stderr


class _Scoring:
    """What both texts of rows cost models: model -> text -> rows, and how many tokens went through the models."""

    def __init__(self, job: StageContext) -> None:
        self._job = job
        self._num_done = 0
        self.nll: dict[str, dict[str, list[Any]]] = {}
        self.num_tokens = 0

    def score(self, model: str, rows: Sequence[Row], max_stderr: float | None) -> list[Row]:
        """Score rows under a model, and return those that were: all, or the first that make the error small enough."""
        from sdft_ray.evaluation.shift import paired_gap

        score, found = scorer(self._job, model), {text: [] for text in TEXTS}
        self.nll[model] = found
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            num_wanted = len(rows) if max_stderr is None else start + len(part)
            texts = text_documents(self._job.teacher.chat, part)
            documents = [document for text in texts.values() for document in text]
            nlls = iter(score(documents, self._teller(len(TEXTS) * num_wanted)))
            for text in TEXTS:
                found[text] += [next(nlls) for _ in part]
            self.num_tokens += sum(len(document.ids) for document in documents)
            self._num_done += len(documents)
            error = paired_gap(*(found[text] for text in TEXTS)).stderr
            if max_stderr is not None and error is not None and error <= max_stderr:
                return list(rows[: start + len(part)])
        return list(rows)

    def _teller(self, num_responses: int) -> Callable[[int, int], None]:
        """Tell progress, in responses of all models, of which each has at least `num_responses`."""
        before, total = self._num_done, num_responses * len(_models(self._job))
        return lambda done, _: self._job.progress(before + done, total, "responses")
