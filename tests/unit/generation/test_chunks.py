"""Keys, chunks and the ledger: nothing is asked twice, nothing is left out, order is that of the seed set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.generation.chunks import (
    CHUNK_ROWS,
    KEY_BYTES,
    Keys,
    Ledger,
    keys_of,
    positions_of,
    row_key,
    runs_of,
    table_keys,
)

SCHEMA = pa.schema([("row_key", pa.binary(KEY_BYTES)), ("sample_index", pa.int32()), ("response", pa.string())])


def _keys(names: Sequence[str]) -> Keys:
    return np.frombuffer(b"".join(row_key(name) for name in names), dtype=f"V{KEY_BYTES}")


def _answers(names: Sequence[str], mark: str = "", *, samples: int = 1) -> pa.Table:
    rows = [
        {"row_key": row_key(name), "sample_index": index, "response": f"{name}{mark}{index}"}
        for name in names
        for index in range(samples)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_keys_know_which_field_a_text_stands_in() -> None:
    assert row_key("ab", "c") != row_key("a", "bc")
    assert row_key("a", "b") != row_key("a", "b", "")
    assert len(row_key("")) == KEY_BYTES


def test_keys_of_batches_are_those_of_their_rows() -> None:
    table = pa.table({"b": ["x", "y"], "a": ["1", "2"], "context": ["", "c"]})
    keys = [bytes(key) for key in keys_of(table.to_batches(), ("a", "b"))]
    assert keys == [row_key("1", "x"), row_key("2", "y", context="c")]


def test_a_context_changes_the_key_and_none_does_not() -> None:
    assert row_key("1", "x", context="") == row_key("1", "x")
    assert len({row_key("1", "x"), row_key("1", "x", context="c"), row_key("1", "x", context="d")}) == 3


def test_chunks_hold_every_missing_row_once_and_are_named_by_content() -> None:
    names = [f"row{i}" for i in range(150)]
    ledger = Ledger(_keys(names))
    chunks = list(ledger.chunks())
    assert [len(chunk.positions) for chunk in chunks] == [CHUNK_ROWS, CHUNK_ROWS, 150 - 2 * CHUNK_ROWS]
    assert np.concatenate([chunk.positions for chunk in chunks]).tolist() == list(range(150))
    moved = Ledger(_keys(["new", *names]))
    moved.find("elsewhere", _keys(["new"]))
    assert [chunk.name for chunk in moved.chunks()] == [chunk.name for chunk in chunks]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_ledger_assembles_what_was_found_and_what_was_made(data: st.DataObject) -> None:
    """Whatever part of the rows earlier sources hold, with rows of other seed sets and twice over."""
    names = [f"row{i}" for i in range(data.draw(st.integers(1, 300)))]
    ledger = Ledger(_keys(names))
    store: dict[str, pa.Table] = {}
    expected: dict[str, str] = {}
    for source in ("a", "b"):
        held = data.draw(st.lists(st.sampled_from(names), unique=True), label=source)
        store[source] = _answers([*held, "stranger"], source, samples=data.draw(st.integers(1, 3)))
        fresh = [name for name in held if name not in expected]
        assert ledger.find(source, table_keys(store[source])) == len(fresh)
        expected |= dict.fromkeys(fresh, source)
    for chunk in ledger.chunks():
        asked = [names[position] for position in chunk.positions]
        store[chunk.name] = _answers(asked[::-1])
        ledger.place(chunk.name, chunk.positions)
        expected |= dict.fromkeys(asked, "")
    window_rows = data.draw(st.sampled_from([13, 4096]))
    made = pa.concat_tables(ledger.assemble(store.__getitem__, window_rows=window_rows))
    firsts = [text for text, index in zip(*made.select([2, 1]).to_pydict().values(), strict=True) if index == 0]
    assert firsts == [f"{name}{expected[name]}0" for name in names]
    pairs = list(zip(made["row_key"].to_pylist(), made["sample_index"].to_pylist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_a_chunk_that_was_written_twice_counts_once() -> None:
    ledger = Ledger(_keys(["a", "b"]))
    twice = pa.concat_tables([_answers(["a"], "first", samples=2), _answers(["b", "a"], "second", samples=2)])
    ledger.place("twice", np.arange(2))
    (made,) = ledger.assemble({"twice": twice}.__getitem__)
    assert made["response"].to_pylist() == ["afirst0", "afirst1", "bsecond0", "bsecond1"]


def test_a_source_without_the_row_it_was_noted_for_is_an_error() -> None:
    ledger = Ledger(_keys(["a"]))
    ledger.place("empty", np.arange(1))
    with pytest.raises(KeyError):
        list(ledger.assemble({"empty": _answers(["b"])}.__getitem__))


def test_an_empty_seed_set_has_no_chunks() -> None:
    ledger = Ledger(_keys([]))
    assert ledger.find("a", _keys(["x"])) == 0
    assert list(ledger.chunks()) == []
    assert list(ledger.assemble({}.__getitem__)) == []


@given(st.sets(st.integers(0, 300), min_size=1))
def test_runs_stand_for_positions(wanted: set[int]) -> None:
    positions = np.array(sorted(wanted), dtype=np.int32)
    runs = runs_of(positions)
    assert positions_of(runs.tolist()).tolist() == positions.tolist()
    assert len(runs) == 2 * len([p for p in wanted if p - 1 not in wanted])


def test_a_sample_is_drawn_by_content_and_seed_alone() -> None:
    names = [f"row{i}" for i in range(500)]
    ledger = Ledger(_keys(names))
    drawn = ledger.draw(50, 0)
    assert len(set(drawn.tolist())) == 50
    assert ledger.draw(20, 0).tolist() == drawn[:20].tolist()
    assert ledger.draw(50, 1).tolist() != drawn.tolist()
    assert sorted(ledger.draw(900, 0).tolist()) == list(range(500))
    moved = Ledger(_keys(["new", *names[::-1]]))
    again = [["new", *names[::-1]][position] for position in moved.draw(51, 0)]
    assert [name for name in again if name != "new"][:50] == [names[position] for position in drawn]
    assert 150 < drawn.mean() < 350


def test_drawn_rows_make_the_first_chunks() -> None:
    names = [f"row{i}" for i in range(300)]
    ledger = Ledger(_keys(names))
    drawn = ledger.draw(100, 0)
    ledger.find("there", _keys([names[drawn[0]]]))
    assert ledger.sources_of(drawn) == ["there"]
    first, second, *others = ledger.chunks(drawn)
    assert first.positions.tolist() == sorted(drawn[1:65].tolist())
    assert second.positions.tolist() == sorted(drawn[65:].tolist())
    everything = np.concatenate([part.positions for part in (first, second, *others)])
    assert sorted(everything.tolist()) == sorted(set(range(300)) - {int(drawn[0])})
