import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_ray.data.example import SEED_SCHEMA, example_id
from sdft_ray.data.messages import row_prompt
from sdft_ray.data.reading import Reading
from sdft_ray.data.sources import TWIN, read_tables
from sdft_ray.errors import DataError
from tests.unit.data.turns import turns

GOOD = {"instruction": "What is 2 + 2?", "reference": "It is 4. #### 4"}


def read_rows(source: str, **options: Any) -> pa.Table:
    """All tables of `read_tables` as one."""
    return pa.concat_tables(read_tables(source, **options)).combine_chunks()


def write(path: Path, *rows: Any) -> str:
    """JSONL: strings are written as they are, anything else as JSON."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "seed.jsonl"


def test_minimal_rows(file: Path):
    other = {"instruction": "Größe? 🙂", "reference": "\u0000 tab\there", "ignored": [1, {"a": 2}]}
    table = read_rows(write(file, GOOD, other))
    assert table.schema == SEED_SCHEMA
    assert table.to_pylist() == [
        {
            "example_id": example_id(row["instruction"], row["reference"]),
            "instruction": row["instruction"],
            "context": "",
            "reference_response": row["reference"],
            "answer_kind": "none",
            "check": "",
            "family": "",
        }
        for row in (GOOD, other)
    ]


def test_all_columns_and_their_defaults(file: Path):
    full = GOOD | {"id": "a-1", "answer_kind": "number", "family": "sums", "reference": "#### 4"}
    nulls = GOOD | {"id": 7, "answer_kind": None, "family": None}
    table = read_rows(write(file, full, nulls), answer_kind="text")
    assert table["example_id"].to_pylist() == ["a-1", "7"]
    assert table["answer_kind"].to_pylist() == ["number", "text"]
    assert table["family"].to_pylist() == ["sums", ""]


def test_checks_come_from_the_row_or_the_argument_and_are_tried(file: Path):
    own, none = GOOD | {"answer_kind": "json", "check": "{}"}, GOOD | {"id": "b", "answer_kind": "number"}
    tried = []

    def check_error(kind: str, check: str) -> str:
        tried.append((kind, check))
        return "no good" if check == "bad" else ""

    table = read_rows(
        write(file, own, none, GOOD | {"id": "c"}), answer_kind="json", check="d", check_error=check_error
    )
    assert table["check"].to_pylist() == ["{}", "", "d"]
    assert tried == [("json", "{}"), ("number", ""), ("json", "d")]
    with pytest.raises(DataError, match="line 2: no good"):
        read_rows(write(file, own, none | {"check": "bad"}), check_error=check_error)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_give_their_last_answer(tmp_path: Path, suffix: str):
    rows = [
        {"messages": turns("user", "Q1", "assistant", "A1", "user", "Q2", "assistant", "A2"), "family": "chat"},
        {"messages": turns("system", "Be brief.", "user", "Q3", "assistant", "A3"), "family": "chat"},
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, *rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    table = read_rows(str(path))
    assert table["instruction"].to_pylist() == ["Q2", "Q3"]
    assert [row_prompt(row) for row in table.to_pylist()] == [row["messages"][:-1] for row in rows]
    assert table["reference_response"].to_pylist() == ["A2", "A3"]
    assert table["family"].to_pylist() == ["chat", "chat"]


def test_mapping(file: Path):
    source = write(file, {"question": "q", "answer": "a", "key": 3, "kind": "choice", "instruction": "no"})
    columns = {"instruction": "question", "reference": "answer", "id": "key", "answer_kind": "kind"}
    assert read_rows(source, columns=columns).to_pylist() == [
        {
            "example_id": "3",
            "instruction": "q",
            "context": "",
            "reference_response": "a",
            "answer_kind": "choice",
            "check": "",
            "family": "",
        }
    ]


def test_order_and_limit(file: Path):
    rows = [{"instruction": f"q{i}", "reference": "a"} for i in (3, 1, 2, 0)]
    source = write(file, *rows)
    assert read_rows(source)["instruction"].to_pylist() == ["q3", "q1", "q2", "q0"]
    assert read_rows(source, limit=2)["instruction"].to_pylist() == ["q3", "q1"]
    assert read_rows(source, limit=9).num_rows == 4
    # rows after the limit are not looked at
    assert read_rows(write(file, *rows, "{broken"), limit=4).num_rows == 4


def test_blank_lines_crlf_and_byte_order_mark(file: Path):
    line = json.dumps(GOOD).encode()
    other = json.dumps(GOOD | {"instruction": "And 3 + 3?"}).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + other)
    assert read_rows(str(file)).num_rows == 2


def test_other_places(tmp_path: Path):
    line = json.dumps(GOOD).encode()
    packed = tmp_path / "seed.jsonl.gz"
    packed.write_bytes(gzip.compress(line))
    with fsspec.open("memory://seed/rows.jsonl", "wb") as stream:
        stream.write(line)  # type: ignore[union-attr]
    expected = read_rows(write(tmp_path / "seed.jsonl", GOOD))
    for source in (str(packed), "memory://seed/rows.jsonl", f"file://{tmp_path}/seed.jsonl"):
        assert read_rows(source).equals(expected)


def test_parquet_equals_jsonl(tmp_path: Path):
    rows = [{"id": f"r{i}", "instruction": f"q{i}", "reference": "a", "family": "f", "score": i / 2} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "instruction", table["instruction"].cast(pa.large_string()).dictionary_encode())
    pq.write_table(table, tmp_path / "seed.parquet", row_group_size=2)
    expected = read_rows(write(tmp_path / "seed.jsonl", *rows))
    assert read_rows(str(tmp_path / "seed.parquet")).equals(expected)
    assert read_rows(str(tmp_path / "seed.parquet"), limit=3).equals(expected.slice(0, 3))


def test_plain_text_calibration(file: Path):
    source = write(file, {"text": "once upon"}, {"text": "a time", "instruction": ""}, {"text": "x", **GOOD})
    table = read_rows(source, columns={"reference": "text"}, plain_text=True)
    assert table["instruction"].to_pylist() == ["", "", GOOD["instruction"]]
    with pytest.raises(DataError, match="line 1: no column 'instruction'"):
        read_rows(source, columns={"reference": "text"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"instruction": "a" "b"}', r"line 3: not valid JSON: Expecting ',' delimiter at column 21"),
        ("[1, 2]", r"line 3: must be a JSON object, not a list → this is a JSON array"),
        ("17", "line 3: must be a JSON object, not a number"),
        ("[" * 100_000, "line 3: JSON with too many levels, or a number that is too long → this is a JSON array"),
        (
            {"instruction": "a", "referense": "b"},
            r"line 3: no column 'reference' .*→ did you mean `columns: \{reference: referense\}`",
        ),
        ({"instruction": "a"}, r"line 3: no column 'reference' \(columns: instruction\)"),
        ({"completely": 1, "other": 2}, r"no column 'instruction' .*→ map `instruction` to one of these columns"),
        ({}, r"no column 'instruction' \(columns: none\)"),
        (GOOD | {"reference": 4}, "line 3: reference must be text, not a number"),
        (GOOD | {"instruction": ["a"]}, "line 3: instruction must be text, not a list"),
        (GOOD | {"family": {"a": 1}}, "line 3: family must be text, not an object"),
        (GOOD | {"id": True}, "line 3: id must be text, not a boolean"),
        (GOOD | {"id": 1.5}, "line 3: id must be text, not a number"),
        (GOOD | {"answer_kind": "numbr"}, "line 3: unknown answer kind 'numbr' → did you mean number"),
        ('{"instruction": "\\ud800", "reference": "b"}', "line 3: instruction contains a lone surrogate"),
    ],
)
def test_bad_row_names_its_line(file: Path, row: Any, message: str):
    source = write(file, GOOD | {"id": "one"}, {"instruction": "q2", "reference": "a2"}, row)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(source)
    assert str(file) in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_rows_without_question_or_answer_are_left_out_and_counted(file: Path):
    empty = [GOOD | {"instruction": " \n"}, GOOD | {"reference": ""}, GOOD | {"reference": None}]
    reading = Reading()
    assert read_rows(write(file, GOOD, *empty), reading=reading).num_rows == 1
    assert reading.left_out == {"there is no question": 1, "the answer is empty": 2}
    with pytest.raises(
        DataError, match=r"none of its 3 rows can be trained on \(2: the answer is empty; 1: there is no"
    ):
        read_rows(write(file, *empty))


def test_twins_are_dropped_and_counted_whatever_their_ids(file: Path):
    reading = Reading()
    other = GOOD | {"reference": "It is four. #### 4"}
    table = read_rows(write(file, GOOD | {"id": "a"}, GOOD, other, GOOD | {"id": "a"}, GOOD), reading=reading)
    assert table["reference_response"].to_pylist() == [GOOD["reference"], other["reference"]]
    assert reading.left_out == {TWIN: 3}
    assert reading.num_read == 5


def test_ids_of_several_contents_are_named_in_one_message(file: Path):
    rows = [{"id": i % 12, "instruction": f"q{i}", "reference": "a"} for i in range(24)]
    with pytest.raises(DataError, match=r"another content \(12\): '0' \(line 1 and line 13\)") as caught:
        read_rows(write(file, *rows))
    assert caught.value.message.endswith("'9' (line 10 and line 22) and 2 more")
    with pytest.raises(DataError, match=r"another content \(1\): '0' \(line 1 and line 2\)"):
        read_rows(write(file, GOOD | {"id": 0}, GOOD | {"id": "0", "reference": "4"}))
    assert read_rows(write(file, *rows), columns={"id": ""}).num_rows == 24


def test_mapped_column_must_be_there(file: Path):
    with pytest.raises(DataError, match="line 2: no column 'kind' for answer_kind"):
        read_rows(write(file, GOOD | {"kind": "text"}, GOOD), columns={"answer_kind": "kind"})


def test_bytes_that_are_not_utf8(file: Path):
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_rows(str(file))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_no_rows(file: Path, text: str):
    file.write_text(text)
    with pytest.raises(DataError, match="has no rows"):
        read_rows(str(file))


def test_missing_file_suggests_a_near_one(file: Path):
    write(file, GOOD)
    with pytest.raises(DataError, match=r"no file .*sead\.jsonl → did you mean .*seed\.jsonl"):
        read_rows(str(file.with_name("sead.jsonl")))
    with pytest.raises(DataError, match=r"no file .* → check the path"):
        read_rows(str(file.parent / "nowhere" / "seed.jsonl"))
    with pytest.raises(DataError, match="no file memory://none"):
        read_rows("memory://none/seed.jsonl")


def test_places_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"unknown file type → give a \.jsonl, \.json or \.parquet"):
        read_rows(str(tmp_path / "rows.csv"))
    with pytest.raises(DataError, match="cannot read"):
        read_rows(str(tmp_path / "folder.jsonl"))
    with pytest.raises(DataError, match="cannot open nosuch://x"):
        read_rows("nosuch://x/rows.jsonl")


def test_damaged_parquet(tmp_path: Path):
    path = tmp_path / "seed.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), path)
    whole = path.read_bytes()
    for damaged in (b"", b"not parquet at all", whole[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read .*the file is complete"):
            read_rows(str(path))


def test_damaged_gzip(tmp_path: Path):
    path = tmp_path / "seed.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-12])
    with pytest.raises(DataError, match="cannot read"):
        read_rows(str(path))


def test_bad_parquet_row_names_row_and_columns(tmp_path: Path):
    path = str(tmp_path / "seed.parquet")
    pq.write_table(pa.Table.from_pylist([GOOD, {"instruction": "b", "reference": None}]), path)
    assert read_rows(path).num_rows == 1
    pq.write_table(pa.Table.from_pylist([{"instructions": "a", "answer": 3, "reference": "b"}]), path)
    with pytest.raises(DataError, match=r"row 1: no column 'instruction' \(columns: .*answer.*did you mean"):
        read_rows(path)
    with pytest.raises(DataError, match=r"row 1: reference \(`answer`\) must be text, not a number"):
        read_rows(path, columns={"instruction": "instructions", "reference": "answer"})
    pq.write_table(pa.table({"instruction": pa.array([], "string")}), path)
    with pytest.raises(DataError, match="has no rows"):
        read_rows(path)


def test_bad_arguments(file: Path):
    source = write(file, GOOD)
    with pytest.raises(DataError, match="unknown column 'instructon' in the mapping → did you mean instruction"):
        read_rows(source, columns={"instructon": "a"})
    with pytest.raises(DataError, match="unknown answer kind 'xml'"):
        read_rows(source, answer_kind="xml")
    with pytest.raises(DataError, match="no file or data set 'gsm9k' → did you mean gsm8k"):
        read_rows("gsm9k")
    with pytest.raises(DataError, match="defines its columns itself"):
        read_rows("gsm8k", columns={"instruction": "question"})


@pytest.mark.slow
def test_fifty_thousand_rows_in_about_a_second(file: Path):
    write(file, *({"instruction": f"What is {i} plus 7? " * 5, "reference": "so " * 60} for i in range(50_000)))
    read_rows(str(file), limit=1)
    start = time.process_time()
    assert read_rows(str(file)).num_rows == 50_000
    assert time.process_time() - start < 2.0


@pytest.mark.slow
def test_reading_files_needs_no_torch():
    code = "import sys, sdft_ray.data.sources; sys.exit(bool({'torch', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tables_are_streamed(file: Path) -> None:
    """A large set is never whole in memory, and an id of its first table is still known in its last."""
    rows = [{"id": str(n), "instruction": f"q{n}", "reference": "a"} for n in range(10)]
    tables = list(read_tables(write(file, *rows), table_rows=4))
    assert [table.num_rows for table in tables] == [4, 4, 2]
    assert pa.concat_tables(tables)["example_id"].to_pylist() == [str(n) for n in range(10)]
    stream = read_tables(write(file, *rows, "{broken"), table_rows=4)
    assert next(stream).num_rows == 4
    with pytest.raises(DataError, match=r"'1' \(line 2 and line 11\)"):
        list(read_tables(write(file, *rows, GOOD | {"id": "1"}), table_rows=4))
