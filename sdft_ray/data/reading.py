"""How the rows of a source were read, and what became of those that gave no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

AS_NAMED = "`instruction` asks, `reference` answers"
_MAX_NAMES = 8
"""Columns that are listed as not read."""


@dataclass
class Reading:
    """Filled in while rows are read."""

    num_read: int = 0
    """Rows of the source."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> rows, or single answers of a conversation, that were left out."""
    num_earlier: int = 0
    """Answers that are not trained on because a later one of their conversation is."""
    layouts: Counter[str] = field(default_factory=Counter)
    """Which columns were read as what -> rows."""
    unused: dict[str, None] = field(default_factory=dict)
    """Columns that were not read."""

    def summary(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "num_read": self.num_read,
            "left_out": dict(self.left_out.most_common()),
            "num_earlier": self.num_earlier,
            "layouts": dict(self.layouts.most_common()),
            "unused": list(self.unused),
        }

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Self:
        """The inverse of `summary`."""
        counted = {name: Counter(summary[name]) for name in ("left_out", "layouts")}
        return cls(summary["num_read"], num_earlier=summary["num_earlier"],
                   unused=dict.fromkeys(summary["unused"]), **counted)  # fmt: skip

    def sentences(self) -> list[str]:
        """What to tell people, the columns first; [] where columns with our names were read and every row gave one."""
        if not (self.left_out or self.unused or self.num_earlier or set(self.layouts) - {AS_NAMED}):
            return []
        layouts = [f"{words} ({_rows(number)})" for words, number in self.layouts.most_common()]
        told = [f"{_rows(self.num_read)} read: {'; '.join(layouts)}."] if layouts else []
        if self.unused:
            names = [f"`{name}`" for name in self.unused][:_MAX_NAMES]
            more = len(self.unused) - len(names)
            told.append(f"Not read: {', '.join(names)}{f' and {more} more columns' if more else ''}.")
        if self.left_out:
            reasons = [f"{number:,} because {why}" for why, number in self.left_out.most_common()]
            told.append(f"Left out: {'; '.join(reasons)}.")
        if self.num_earlier:
            told.append(
                f"{self.num_earlier:,} earlier answers of conversations are read but not trained on; "
                "train.turns: all trains on them too."
            )
        return told


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"
