"""Several tests at once: p-values adjusted so that the chance of any false alarm stays at the level of one test."""

from __future__ import annotations

from collections.abc import Mapping


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values by name (Holm 1979, Scand. J. Stat. 6), in [0, 1]; valid however the tests depend on another.

    The smallest of m is multiplied by m, the next by m - 1, and so on, each at least as large as the one before.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
