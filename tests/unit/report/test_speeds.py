"""From the figures of stage `speed` to the report's tables, worked out by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sdft_ray.evaluation.rounds import over_rounds
from sdft_ray.evaluation.speed import BatchSpeed, ModelSpeed
from sdft_ray.report.run.gather import speed as read_speed
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.tables import speed_tables
from sdft_ray.report.toolbox.table import Table
from tests.support.recipes import make_recipe
from tests.unit.report.made_up import report_data


def batch(batch_rows: int, slowness: tuple[float, ...], peak: int | None = None) -> BatchSpeed:
    return BatchSpeed(
        batch_rows=batch_rows,
        prefill=over_rounds(100 * batch_rows / s for s in slowness),
        decode=over_rounds(10 * batch_rows / s for s in slowness),
        first_token_s=over_rounds(0.5 * s for s in slowness),
        kv_bytes=1_000 * batch_rows,
        peak_bytes=peak,
    )


def figures(*, peak: int | None = None) -> dict[str, Any]:
    """The pruned model takes half the time of the teacher in each of three rounds, in the second one a quarter."""
    machine = (1.0, 5.0, 2.0)
    pruned = (0.5, 1.25, 1.0)
    return {
        "teacher": asdict(ModelSpeed(4_000, (batch(1, machine, 900), batch(8, machine, 900)))),
        "pruned": asdict(ModelSpeed(3_000, (batch(1, pruned, peak), batch(8, pruned, peak)))),
    }


def spaced(table: Table) -> list[list[tuple[str, str]]]:
    rows = [row.cells for group in table.groups for row in group.rows]
    return [[(cell.text.replace("\u202f", " "), cell.note.replace("\u202f", " ")) for cell in row] for row in rows]


def heads(table: Table) -> list[str]:
    return [row.head.text for group in table.groups for row in group.rows]


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    found = read_speed(make_recipe(tmp_path, tmp_path), figures(peak=600))
    assert (found.prompt_tokens, found.new_tokens) == (64, 64)
    assert (found.teacher.weight_bytes, found.pruned.weight_bytes) == (4_000, 3_000)
    assert [was.batch_rows for was, _ in found.batches] == [1, 8]
    speed, memory = map(spaced, speed_tables(ReportData(name="x", speed=found)))
    for (was, now), cells, sizes in zip(found.batches, speed, memory, strict=True):
        # 2, 4, 2 times as fast: the ratio of the medians would be 2 as well, its quartiles would not.
        assert [factor for _, factor in cells] == ["2.00 × (2.00 to 3.00)"] * 3
        assert was.decode.median == 5 * was.batch_rows
        assert (was.first_token_s.median, now.first_token_s.median) == (1, 0.5)
        assert cells[1][0] == f"{5 * was.batch_rows}{'.00' if was.batch_rows == 1 else '.0'} → {10 * was.batch_rows}.0"
        assert cells[2][0] == "1.00 s → 500 ms"
        assert was.kv_bytes == now.kv_bytes == 1_000 * was.batch_rows
        assert (was.peak_bytes, now.peak_bytes) == (900, 600)
        assert sizes[2] == ("900 B → 600 B", "1.50 ×")


def test_a_peak_that_is_not_known_of_both_is_of_none(tmp_path: Path) -> None:
    found = read_speed(make_recipe(tmp_path, tmp_path), figures())
    _, memory = speed_tables(ReportData(name="x", speed=found))
    assert [len(row) for row in spaced(memory)] == [2, 2]


def test_measured_beside_computed() -> None:
    speed, memory = speed_tables(report_data())
    assert heads(speed) == heads(memory) == ["1", "16", "computed"]
    assert [c.text for c in speed.columns[1:]] == ["Prefill, tokens/s", "Decode, tokens/s", "First token after"]
    assert spaced(speed) == [
        [
            ("9,480 → 13,650", "1.44 × (1.43 to 1.45)"),
            ("121 → 167", "1.38 × (1.37 to 1.39)"),
            ("6.75 ms → 4.69 ms", "1.44 × (1.43 to 1.45)"),
        ],
        [
            ("61,200 → 89,900", "1.47 × (1.46 to 1.48)"),
            ("1,210 → 1,742", "1.44 × (1.43 to 1.45)"),
            ("16.7 ms → 11.4 ms", "1.47 × (1.46 to 1.48)"),
        ],
        # 4,841,472 / 3,334,144 multiplications and 4,846,848 / 3,337,984 bytes
        [("1.45 ×", "matmul FLOPs"), ("1.45 ×", "weight bytes"), ("1.45 ×", "matmul FLOPs")],
    ]
    assert spaced(memory)[1:] == [
        [("4.62 MiB → 3.18 MiB", "1.45 ×"), ("11.9 MiB → 7.94 MiB", "1.50 ×"), ("20.0 MiB → 18.0 MiB", "1.11 ×")],
        [("1.45 ×", "weight bytes"), ("1.50 ×", "bytes per token"), ("", "")],
    ]


def test_each_computed_factor_stands_in_its_own_column() -> None:
    data = report_data()
    assert data.sizes is not None
    pruned = replace(
        data.sizes.pruned,
        matmul_flops_per_token=data.sizes.teacher.matmul_flops_per_token // 3,
        weight_bytes=data.sizes.teacher.weight_bytes // 4,
        kv_bytes_per_token=data.sizes.teacher.kv_bytes_per_token // 6,
    )
    sizes = data.sizes.model_copy(update={"pruned": pruned})
    speed, memory = speed_tables(data.model_copy(update={"sizes": sizes}))
    assert [cell[0] for cell in spaced(speed)[-1]] == ["3.00 ×", "4.00 ×", "3.00 ×"]
    assert [cell[0] for cell in spaced(memory)[-1]] == ["4.00 ×", "6.00 ×", ""]


def test_what_is_not_known_has_no_column_and_no_row() -> None:
    data = report_data()
    assert data.speed is not None
    batches = tuple(replace(batch, peak_bytes=None) for batch in data.speed.pruned.batches)
    speed = data.speed.model_copy(update={"pruned": replace(data.speed.pruned, batches=batches)})
    for table in speed_tables(data.model_copy(update={"speed": speed, "sizes": None})):
        assert heads(table) == ["1", "16"]
    _, memory = speed_tables(data.model_copy(update={"speed": speed}))
    assert [column.text for column in memory.columns[1:]] == ["Weights", "Keys and values"]
    assert [len(row) for row in spaced(memory)] == [2, 2, 2]
    assert speed_tables(ReportData(name="x")) == []
