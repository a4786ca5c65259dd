"""The validation split: training rows that no arm trains on, so that learning rates are chosen without test tasks.

The split depends only on a hash of the `example_id`: every arm holds out the same rows, in any order, and adding rows
moves no other row between the splits. A larger fraction holds out the same rows and more. Of a conversation that gave
several rows (ID#1, ID#2, ...) all are on one side, because a later prompt contains the earlier answers.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pyarrow as pa

from sdft_ray.errors import DataError

_SALT = b"held out:"  # hashed again, because ids may be given by users
_TURN = re.compile(r"#\d+\Z", re.ASCII)


def is_held_out(example_id: str, fraction: float) -> bool:
    """Whether the row is in the validation split, which is `fraction` in [0, 1] of the rows."""
    whole = _TURN.sub("", example_id)
    digest = hashlib.sha256(_SALT + whole.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def held_out_mask(table: pa.Table, fraction: float) -> np.ndarray:
    """Boolean mask, (N,), of the held-out rows of a table with an `example_id`."""
    return np.array([is_held_out(name, fraction) for name in table["example_id"].to_pylist()], np.bool_)


def part(table: pa.Table, fraction: float, *, held_out: bool) -> pa.Table:
    """The held-out rows, or all others, in order. Raises `DataError` if there are none."""
    mask = held_out_mask(table, fraction)
    rows = table.filter(pa.array(mask if held_out else ~mask))
    if not rows.num_rows:
        raise DataError(
            f"none of the {table.num_rows:,} rows is {'held out' if held_out else 'left to train on'} "
            f"at train.held_out {fraction:g}",
            f"{'raise' if held_out else 'lower'} train.held_out, or take a larger seed set",
        )
    return rows
