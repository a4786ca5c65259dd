"""The items behind a score: one row each, for people to read and for comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from lm_eval.api.task import ConfigurableTask, Task

from sdft_ray.evaluation.questions import Text
from sdft_ray.statistics.scores import GenerationStats, Output

ITEMS = pa.schema(
    [
        ("task", pa.string()),
        ("item", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("filtered", pa.string()),
        ("target", pa.string()),
        ("value", pa.float64()),
        ("num_tokens", pa.int32()),
        ("repetition", pa.float64()),
        ("truncated", pa.bool_()),
        ("no_answer", pa.bool_()),
    ]
)
"""`prompt` is at most its last 2,000 characters; `response` the text written, or the option chosen; `filtered` what the
task's filter took out of it. The last four are null for items that are not written, or not known to be."""

_PROMPT_CHARS = 2000
_NOTHING = {"", "[invalid]"}
"""What lm-eval's filters give where they find nothing."""


def item_rows(
    task: Task, samples: Sequence[Mapping[str, Any]], metric: str, texts: Mapping[tuple[str, int], Sequence[Text]]
) -> list[dict[str, Any]]:
    """Rows of the items that have a value of their own, without their task's name. `samples` are of one filter."""
    rows = []
    for sample in samples:
        value = sample.get(metric)
        if not isinstance(value, (bool, int, float)):
            continue
        prompt, response, filtered, target = _shown(task, sample, metric)
        row = {
            "item": str(sample["doc_id"]),
            "prompt": prompt[-_PROMPT_CHARS:],
            "response": response,
            "filtered": filtered,
            "target": target,
            "value": float(value),
            **dict.fromkeys(("num_tokens", "repetition", "truncated", "no_answer")),
        }
        if task.OUTPUT_TYPE == "generate_until":
            row["no_answer"] = filtered.strip() in _NOTHING
            for text in texts.get((task.task_name, sample["doc_id"]), ())[:1]:
                row |= {"num_tokens": text.num_tokens, "repetition": text.repetition, "truncated": text.truncated}
        rows.append(row)
    return rows


def _shown(task: Task, sample: Mapping[str, Any], metric: str) -> tuple[str, str, str, str]:
    """Prompt, response, what the filter took of it, and target, as texts."""
    prompt = str(sample["arguments"][0][0])
    target = str(sample["target"])
    if task.OUTPUT_TYPE == "generate_until":
        return prompt, str(sample["resps"][0][0]), _first(sample["filtered_resps"][0]), target
    # Tasks written as Python classes need not tell their options.
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask):
        return prompt, "", "", target
    options = [str(option) for option in task.doc_to_choice(sample["doc"])]
    likelihoods = [answer[0] for answer in sample["filtered_resps"][: len(options)]]
    ranked = [value / _weight(option, metric) for option, value in zip(options, likelihoods, strict=True)]
    chosen = options[ranked.index(max(ranked))]
    # With several contexts to one continuation (WinoGrande) the right option is what the text of the prompt tells.
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(gold, int) and 0 <= gold < len(options):
        target = options[gold]
    return prompt, chosen, chosen, target


def _weight(option: str, metric: str) -> int:
    """What the metric divides an option's log-likelihood by."""
    length = {"acc_norm": len(option), "acc_bytes": len(option.encode())}.get(metric, 1)
    return max(1, length)


def _first(filtered: Any) -> str:
    """Filters that keep several answers give a list."""
    return str(filtered[0]) if isinstance(filtered, list) and filtered else str(filtered or "")


def written_of(rows: Sequence[Mapping[str, Any]]) -> GenerationStats | None:
    """How the answers of a task look; None where nothing is known of how they were written."""
    known = [row for row in rows if row["num_tokens"] is not None]
    if not known:
        return None
    return GenerationStats(
        num_answers=len(known),
        mean_tokens=statistics.fmean(row["num_tokens"] for row in known),
        truncated=statistics.fmean(row["truncated"] for row in known),
        no_answer=statistics.fmean(row["no_answer"] for row in known),
        repetition=statistics.fmean(row["repetition"] for row in known),
    )


def outputs_of(
    leaves: Sequence[Task], samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, num_outputs: int
) -> tuple[Output, ...]:
    """The first generated responses, whole."""
    rows = [
        row
        for task in leaves
        if task.OUTPUT_TYPE == "generate_until"
        for row in samples[task.task_name]
        if isinstance(row.get(metric), (bool, int, float))
    ]
    return tuple(
        Output(
            item=str(row["doc_id"]),
            prompt=str(row["arguments"][0][0]),
            response=str(row["resps"][0][0]),
            filtered=_first(row["filtered_resps"][0]),
            target=str(row["target"]),
            value=float(row[metric]),
        )
        for row in rows[:num_outputs]
    )
