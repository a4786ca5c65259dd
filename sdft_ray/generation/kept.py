"""How many rewrites are kept: the row that selection makes of a row's samples, reasons counted, and a share refused.

Selection counts all rows at the end; generation judges a sample of them on the way, by the same rules, so that it can
stop when the share is surely too small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sdft_ray.errors import DataError
from sdft_ray.generation.selection import Reason, select
from sdft_ray.statistics.shares import is_surely_below

Fits = Callable[[Mapping[str, str], str], bool]
"""Whether a row's prompt and a response fit a training row together."""

NUM_EXAMPLES = 3
_ERROR = 0.01
"""Probability that a generation is stopped although its share is large enough, at most, over all its looks."""
_QUOTED = 60

NEXT_STEPS: dict[str, str] = {
    "truncated": "raise generate.max_tokens; if answers run on past their end, the template's end of turn does not "
    "stop generation: see the tokenizer's eos_token and generation_config.json",
    "no_reference_answer": "correct seed_set.answer_kind: it finds no answer in the references",
    "too_long": "raise train.max_seq_len",
    "error": "the summary of generate has the errors",
    "leaked_reference": "use another generate.template",
}
"""Most frequent reason -> what to do where nothing was kept."""


def chosen(row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], fits: Fits) -> dict[str, Any]:
    """A row of `SELECTED_SCHEMA`: the first sample that passes, else the reference with the reason of the last one.

    `samples` are those of the row in the order in which they were drawn, with `response` and `finish_reason`.
    """
    sample = samples[0]
    selected = select(row, sample["response"], sample["finish_reason"], partial(fits, row))
    for later in samples[1:]:
        if selected.source == "distilled":
            break
        sample = later
        selected = select(row, sample["response"], sample["finish_reason"], partial(fits, row))
    return {
        **row,
        "distilled_response": sample["response"],
        "response": selected.response,
        "source": selected.source,
        "reason": selected.reason,
    }


class Kept:
    """Selected rows counted by reason, with a few rewrites that were not kept."""

    def __init__(self) -> None:
        self.reasons: Counter[Reason] = Counter()
        self._examples: dict[Reason, list[str]] = {}

    @property
    def num_rows(self) -> int:
        return self.reasons.total()

    @property
    def num_kept(self) -> int:
        return self.reasons["kept"]

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row that `chosen` returned."""
        reason: Reason = row["reason"]
        self.reasons[reason] += 1
        seen = self._examples.setdefault(reason, [])
        if reason != "kept" and len(seen) < NUM_EXAMPLES:
            seen.append(f"{row['example_id']}: {_quoted(row['distilled_response'])}")

    def examples(self) -> list[str]:
        """At most three rewrites that were not kept, with the reason: the first of each reason, frequent ones first."""
        by_reason = [(reason, self._examples[reason]) for reason, _ in self.reasons.most_common() if reason != "kept"]
        ranked = [
            (place, rank, f"{text} ({reason})")
            for rank, (reason, texts) in enumerate(by_reason)
            for place, text in enumerate(texts)
        ]
        return [text for _, _, text in sorted(ranked)[:NUM_EXAMPLES]]

    def check_any(self) -> None:
        """Raise `DataError` if nothing was kept: an arm on the distilled set would train on references alone."""
        if self.num_kept:
            return
        (most, _), *_ = self.reasons.most_common(1)
        raise DataError(
            f"none of the {self.num_rows:,} rewrites was kept ({self._counts()}), so there is no distilled set to "
            f"train on; {self._for_example()}",
            NEXT_STEPS.get(most, "look at the answers in the artifact of generate, and check seed_set.answer_kind"),
        )

    def check_share(self, min_share: float) -> None:
        """Raise `DataError` if fewer than the share `min_share` of all rows were kept."""
        if self.num_kept < min_share * self.num_rows:
            raise self._too_few(f"{self.num_kept:,} of {self.num_rows:,} rewrites were kept", min_share)

    def check_sample(self, min_share: float, num_looks: int) -> None:
        """Raise `DataError` if the rows, a random sample, make it sure that fewer than `min_share` of all will be kept.

        Sure means: with a larger share, one of `num_looks` such looks would be as bad in at most 1 % of all runs.
        """
        if is_surely_below(self.num_kept, self.num_rows, min_share, _ERROR / num_looks):
            told = (
                f"{self.num_kept:,} of the first {self.num_rows:,} rewrites, of rows drawn over the whole set, are kept"
            )
            raise self._too_few(f"generation is stopped: {told}", min_share)

    def _too_few(self, told: str, min_share: float) -> DataError:
        (most, _), *_ = ((reason, number) for reason, number in self.reasons.most_common() if reason != "kept")
        first = f"{NEXT_STEPS[most]}; or " if most in NEXT_STEPS else ""
        return DataError(
            f"{told}, and the resources ask for {100 * min_share:g} % (generate.min_kept): {self._counts()}; "
            f"{self._for_example()}",
            f"{first}compare templates with `sdft try RECIPE`, or lower generate.min_kept in the resources; finished "
            "rows are reused",
        )

    def _counts(self) -> str:
        return ", ".join(f"{number:,} {reason}" for reason, number in self.reasons.most_common() if number)

    def _for_example(self) -> str:
        return f"for example {'; '.join(self.examples())}"


def _quoted(text: str) -> str:
    """A text on one line, cut."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= _QUOTED else line[: _QUOTED - 1] + "…"}"'
