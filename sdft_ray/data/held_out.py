"""A part of the training rows that nothing is trained on, so that learning rates can be chosen without test tasks.

A row belongs to it by a hash of its `example_id` alone: the same rows are held out of every arm, whatever their order,
and a set that grows moves no row from one side to the other. A larger fraction holds out the same rows and more.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from sdft_ray.errors import DataError

_SALT = b"held out:"  # the ids of our own rows are hashes already, people's own are not


def is_held_out(example_id: str, fraction: float) -> bool:
    """Whether the row is one of the `fraction`, in [0, 1], that is kept out of training."""
    digest = hashlib.sha256(_SALT + example_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def held_out_mask(table: pa.Table, fraction: float) -> np.ndarray:
    """True for the held-out rows of a table with an `example_id`."""
    return np.array([is_held_out(name, fraction) for name in table["example_id"].to_pylist()], np.bool_)


def part(table: pa.Table, fraction: float, *, held_out: bool) -> pa.Table:
    """The held-out rows, or all others; order kept. Raises `DataError` when there are none."""
    mask = held_out_mask(table, fraction)
    rows = table.filter(pa.array(mask if held_out else ~mask))
    if not rows.num_rows:
        raise DataError(
            f"none of the {table.num_rows:,} rows is {'held out' if held_out else 'left to train on'} "
            f"at train.held_out {fraction:g}",
            f"{'raise' if held_out else 'lower'} train.held_out, or take a larger seed set",
        )
    return rows
