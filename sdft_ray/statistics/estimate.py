"""A value with its uncertainty, and what tests return: plain values that need no numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, its interval, or both; None where it is undefined or unknown.

    `low` and `high` are the limits of the 95 % interval, `method` says how they were computed ("" where there are
    none), and `n` counts the items behind the value.
    """

    value: float | None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = ""
    n: int | None = None

    @property
    def known(self) -> float:
        """The value, where there is one."""
        assert self.value is not None, "a value that is defined"
        return self.value

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Interval:
    """A value and the limits of its interval at `level`.

    All three are None where the value is undefined; only the limits where the items do not bound it.
    """

    value: float | None
    low: float | None
    high: float | None
    level: float = 0.95


@dataclass(frozen=True)
class Standard:
    """A difference of mean scores by standard methods, in units of the metric.

    `stderr` is the clustered standard error, None with a single item; `low` and `high` are the limits of the paired
    percentile bootstrap at `level`.
    """

    value: float
    stderr: float | None
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class McNemar:
    """Two-sided test of equal accuracy: items that only one of two models gets right, and the exact p-value.

    `mid_p` counts the observed table half, as the intervals of `paired` do; the exact one errs on the careful side.
    None in what an earlier version wrote.
    """

    only_first: int
    only_second: int
    p_value: float
    mid_p: float | None = None


def finite(value: Any) -> Any:
    """A copy of dataclasses, dictionaries and sequences in which NaN and infinities are None."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: finite(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(finite(part) for part in value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """As `dataclasses.asdict`, but an `Estimate` has only its value, its standard error, and what else is known."""
    if isinstance(value, Estimate):
        known = {name: part for name, part in vars(value).items() if part not in (None, "")}
        return {"value": value.value, "stderr": value.stderr} | known
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value
