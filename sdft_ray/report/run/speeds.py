"""Measured speed and memory: from the figures of stage `speed` to the page's tables, beside what sizes promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdft_ray.evaluation import rounds
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.report.run.model import PRUNED, TEACHER, BatchSpeed, Compared, ReportData, Size, Speed, Spread
from sdft_ray.report.toolbox.numbers import THIN, count, num_bytes, short_time


def compared_speeds(recipe: Recipe, figures: Mapping[str, Any]) -> Speed:
    """Teacher and pruned model beside each other. `figures`: model -> `evaluation.speed.ModelSpeed` as plain data."""
    teacher, pruned = figures[TEACHER], figures[PRUNED]
    return Speed(
        prompt_tokens=recipe.speed.prompt_tokens,
        new_tokens=recipe.speed.new_tokens,
        weight_bytes=(teacher["weight_bytes"], pruned["weight_bytes"]),
        batches=tuple(_batch(was, now) for was, now in zip(teacher["batches"], pruned["batches"], strict=True)),
    )


def _batch(teacher: Mapping[str, Any], pruned: Mapping[str, Any]) -> BatchSpeed:
    assert teacher["batch_rows"] == pruned["batch_rows"], "both models were measured at the same sizes, in order"
    peaks = (teacher["peak_bytes"], pruned["peak_bytes"])
    return BatchSpeed(
        batch_rows=teacher["batch_rows"],
        prefill=_compared(teacher["prefill"], pruned["prefill"]),
        decode=_compared(teacher["decode"], pruned["decode"]),
        first_token=_compared(teacher["first_token_s"], pruned["first_token_s"], less_is_faster=True),
        kv_bytes=(teacher["kv_bytes"], pruned["kv_bytes"]),
        peak_bytes=None if None in peaks else peaks,
    )


def _compared(teacher: Mapping[str, Any], pruned: Mapping[str, Any], *, less_is_faster: bool = False) -> Compared:
    was, now = rounds.over_rounds(teacher["rounds"]), rounds.over_rounds(pruned["rounds"])
    speedup = rounds.ratio(was, now) if less_is_faster else rounds.ratio(now, was)
    shown = (Spread(median=s.median, low=s.low, high=s.high) for s in (was, now, speedup))
    return Compared(**dict(zip(("teacher", "pruned", "speedup"), shown, strict=True)))


@dataclass(frozen=True)
class SpeedCell:
    """`figures` of teacher and pruned model, and what one is to the other."""

    figures: str
    factor: str


@dataclass(frozen=True)
class SpeedTable:
    """`rows`: how many sequences at once, and a cell per column. `computed` stands under them, empty without sizes."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[SpeedCell, ...]], ...]
    computed: tuple[SpeedCell, ...]


def speed_tables(data: ReportData) -> list[SpeedTable]:
    """Speed, then memory; empty where they were not measured."""
    if data.speed is None:
        return []
    promised = _promised(data.sizes.teacher, data.sizes.pruned) if data.sizes else {}
    return [_speed_table(data.speed, promised), _memory_table(data.speed, promised)]


def _speed_table(speed: Speed, promised: Mapping[str, SpeedCell]) -> SpeedTable:
    def cell(pair: Compared, form: Callable[[float], str]) -> SpeedCell:
        ratio = pair.speedup
        figures = f"{form(pair.teacher.median)} → {form(pair.pruned.median)}"
        return SpeedCell(figures, f"{_times(ratio.median)} ({ratio.low:.2f} to {ratio.high:.2f})")

    def row(batch: BatchSpeed) -> tuple[SpeedCell, ...]:
        return cell(batch.prefill, _tokens), cell(batch.decode, _tokens), cell(batch.first_token, short_time)

    return SpeedTable(
        "Measured speed of teacher and pruned model, by sequences at once",
        ("Prefill, tokens/s", "Decode, tokens/s", "First token after"),
        tuple((f"{batch.batch_rows:,}", row(batch)) for batch in speed.batches),
        # Reading a prompt multiplies; writing a token reads every weight.
        tuple(promised[name] for name in ("flops", "weights", "flops") if promised),
    )


def _memory_table(speed: Speed, promised: Mapping[str, SpeedCell]) -> SpeedTable:
    """With a column for the peak where it is known."""

    def cell(was: int, now: int) -> SpeedCell:
        return SpeedCell(f"{num_bytes(was)} → {num_bytes(now)}", _times(was / now) if now else "")

    def row(batch: BatchSpeed) -> tuple[SpeedCell, ...]:
        peak = () if batch.peak_bytes is None else (cell(*batch.peak_bytes),)
        return cell(*speed.weight_bytes), cell(*batch.kv_bytes), *peak

    rows = tuple((f"{batch.batch_rows:,}", row(batch)) for batch in speed.batches)
    columns = ("Weights", "Keys and values", "Other, at its peak")[: len(rows[0][1])]
    computed = (promised["weights"], promised["kv"], SpeedCell("", ""))[: len(columns)] if promised else ()
    return SpeedTable("Memory of teacher and pruned model, by sequences at once", columns, rows, computed)


def _promised(teacher: Size, pruned: Size) -> dict[str, SpeedCell]:
    """How many times less the pruned model needs by its size alone."""
    factors = {
        "flops": (teacher.matmul_flops_per_token / pruned.matmul_flops_per_token, "matmul FLOPs"),
        "weights": (teacher.weight_bytes / pruned.weight_bytes, "weight bytes"),
        "kv": (teacher.kv_bytes_per_token / pruned.kv_bytes_per_token, "bytes per token"),
    }
    return {name: SpeedCell(_times(factor), words) for name, (factor, words) in factors.items()}


def _times(factor: float) -> str:
    return f"{factor:.2f}{THIN}×"


def _tokens(per_s: float) -> str:
    """0.12, 3.46, 34.6, 346, 3,456, 345,612, 3.46 M."""
    if per_s >= 999_999.5:
        return count(per_s)
    return f"{per_s:,.{0 if per_s >= 99.95 else 1 if per_s >= 9.995 else 2}f}"
