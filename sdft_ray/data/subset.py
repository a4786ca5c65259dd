"""Parts of a set of rows: nested subsets, to compare quality over data-set sizes; random samples; even spreads.

Rows are ranked by a hash of their `example_id` and the first n are taken: every arm gets the same rows, in any order of
the file, and a larger subset contains the smaller ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sdft_ray.errors import DataError

_SALT = b"subset:"  # independent of the validation split
_DRAW = b"drawn:"  # independent of both


def nested_subset(example_ids: Sequence[str], num_rows: int) -> frozenset[str]:
    """The ids of `num_rows` of the rows. Raises `DataError` if there are fewer."""
    if num_rows > len(example_ids):
        raise DataError(
            f"num_rows of an arm is {num_rows:,}, but there are {len(example_ids):,} training rows",
            "lower num_rows, take a larger seed set, or remove num_rows to use all rows",
        )
    return frozenset(sorted(example_ids, key=_rank)[:num_rows])


def drawn(example_ids: Sequence[str]) -> list[int]:
    """All positions in a random order that the ids alone decide: the first n of it are a random sample of n rows."""
    return sorted(range(len(example_ids)), key=lambda position: (_rank(example_ids[position], _DRAW), position))


def _rank(example_id: str, salt: bytes = _SALT) -> bytes:
    return hashlib.sha256(salt + example_id.encode("utf-8", "surrogatepass")).digest()


def spread(num_rows: int, num_wanted: int) -> list[int]:
    """At most `num_wanted` of the positions 0..num_rows-1, evenly over all of them, ascending."""
    count = min(num_rows, num_wanted)
    return [(2 * i + 1) * num_rows // (2 * count) for i in range(count)]
