"""The output of the commands: tables, built from values that other modules compute."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdft_ray.progress import short
from sdft_ray.report.toolbox.numbers import THIN, num_bytes, seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdft_ray.generation.footprint import PassBytes
    from sdft_ray.models.size import ModelSize
    from sdft_ray.pipeline.detectable import Detectable
    from sdft_ray.pipeline.explain import Explanation
    from sdft_ray.pipeline.memory import MemoryPlan, StepMemory
    from sdft_ray.pipeline.run import Run
    from sdft_ray.report.run.why import Why
    from sdft_ray.serving.access import Key
    from sdft_ray.serving.compare import Row
    from sdft_ray.serving.local import Engines
    from sdft_ray.serving.settings import ServeSettings
    from sdft_ray.statistics.scores import Scores
    from sdft_ray.store.store import Store

_SMALL_BYTES = 2**29
"""Steps that need less, and no model, are not listed."""

_MARKS = {"done": "[green]done[/]", "missing": "[yellow]missing[/]", "waits": "[dim]waiting[/]"}


def _console() -> Console:
    return Console(highlight=False)


def _plain_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def print_explanation(explanation: Explanation) -> None:
    """One line per step, and the sizes."""
    console = _console()
    table = _plain_table("step", "state", "address", "why")
    for line in explanation.lines:
        short = line.address.rpartition("/")[2][:8]
        table.add_row(line.step, _MARKS[line.status], short, line.why)
    console.print(table)
    done = sum(line.status == "done" for line in explanation.lines)
    console.print(f"\n{done} of {len(explanation.lines)} steps are done.")
    if explanation.generated is not None:
        console.print(_pass_line(explanation.generated), soft_wrap=True)
    _print_memory(console, explanation.memory)
    for stage, engine in explanation.engines.items():
        console.print(f"Engine of {stage}: {engine.words}; {engine.precision.why}.", soft_wrap=True)
    console.print(_detectable_line(explanation.detectable), soft_wrap=True)
    if explanation.teacher is not None and explanation.pruned is None:
        console.print(
            "The size of the pruned model is known only after the step `rate`, which measures decoding speeds."
        )
        return
    if explanation.teacher is None or explanation.pruned is None:
        console.print("Sizes are unknown: the teacher's config.json cannot be read (set teacher.config).")
        return
    console.print(_size_table(explanation.teacher, explanation.pruned))


def _pass_line(generated: PassBytes) -> str:
    """An upper bound of what `generate` writes, and how it is computed."""
    each = generated.per_token
    products = [f"text {each.text:,}"]
    products += [f"top log-probabilities {each.top_logprobs:,}"] if each.top_logprobs else []
    products += [f"hidden states {each.hidden_states:,}"] if each.hidden_states else []
    total = "size unknown" if generated.total is None else f"at most {num_bytes(generated.total)}"
    rows = "number of rows unknown" if generated.num_rows is None else f"{generated.num_rows:,} rows"
    samples = f" x {generated.num_samples} samples" if generated.num_samples > 1 else ""
    bound = (
        f"generate writes {total}: {rows}{samples} x {generated.max_tokens:,} tokens x {each.total:,} bytes "
        f"({', '.join(products)}); an upper bound, since most responses end before max_tokens"
    )
    return bound.replace(THIN, " ")


def _detectable_line(found: Detectable) -> str:
    """What the evaluation can tell apart, and by which assumption."""
    unknown = [name for name, number in found.num_items.items() if number is None]
    total = sum(number or 0 for number in found.num_items.values())
    tasks = f"{len(found.num_items)} task{'s' * (len(found.num_items) != 1)}"
    if found.smallest is None and unknown:
        return f"evaluate asks {tasks}; what it can tell apart is known once the number of items is (evaluate.limit)"
    part = f", {', '.join(unknown)} not counted" if unknown else ""
    items = f"evaluate asks {tasks}, {'at most ' if found.is_limit else ''}{total:,} items{part}"
    how = f"measured on {found.num_pairs} pairs of models" if found.num_pairs else "an assumption"
    given = f"{100 * found.discordant:.0f} % of the items are right in exactly one of the two ({how})"
    sure = f"with a power of {100 * found.power:.0f} % at the {100 * found.level:.0f} % level, if {given}"
    if found.smallest is None:
        return f"{items}: too few to tell two models apart {sure}"
    fewest = f"{100 * found.smallest:.1f} points on the task with the fewest items"
    mean = "" if found.mean is None else f"{100 * found.mean:.1f} points in the mean of the tasks and "
    several = f"{mean}{fewest}" if len(found.num_items) > 1 else f"{100 * found.smallest:.1f} points"
    return f"{items}: it tells two models apart that differ by {several}, {sure}; other seeds come on top"


def _print_memory(console: Console, plan: MemoryPlan) -> None:
    """What each kind of step needs of the machine at most, what it may have, and what was chosen."""
    table = _plain_table("memory", "needs", "may have", "most for", "chosen", right=("needs", "may have"))
    largest: dict[str, StepMemory] = {}
    for step in plan.steps:
        stage = step.step.partition(":")[0]
        if stage not in largest or step.need_bytes > largest[stage].need_bytes:
            largest[stage] = step
    for step in sorted(largest.values(), key=lambda step: -step.need_bytes):
        if step.bottleneck in ("process", "harness") and step.need_bytes < _SMALL_BYTES:
            continue
        has = "unknown" if step.has_bytes is None else num_bytes(step.has_bytes).replace(THIN, " ")
        needs = num_bytes(step.need_bytes).replace(THIN, " ")
        too_much = step.has_bytes is not None and step.need_bytes > step.has_bytes
        table.add_row(step.step, f"[red]{needs}[/]" if too_much else needs, has, step.bottleneck, step.settings)
    if table.row_count:
        console.print()
        console.print(table)
    for sentence in plan.assumed:
        console.print(sentence, soft_wrap=True)


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """`memory` has the steps, the assumptions and the resources that were chosen."""
    data = asdict(explanation)
    memory = {name: data["memory"][name] for name in ("steps", "assumed", "budget_bytes")}
    return {**data, "memory": {**memory, "resources": explanation.memory.resources.model_dump(mode="json")}}


def _size_table(teacher: ModelSize, pruned: ModelSize) -> Table:
    from sdft_ray.report.run.words import size_rows

    table = _plain_table("", "teacher", "pruned", "change", right=("teacher", "pruned", "change"))
    for *texts, _ in size_rows(teacher, pruned)[:4]:
        table.add_row(*(text.replace(THIN, " ") for text in texts))
    return table


def print_result(run: Run, *, stages: bool = False) -> None:
    """The result table, optionally the stages, and the report's path."""
    from sdft_ray.report.run.engines import engines_line
    from sdft_ray.report.run.terminal import (
        divergence_line,
        flip_lines,
        gap_line,
        grid_line,
        release_lines,
        result_table,
        size_line,
    )  # fmt: skip
    from sdft_ray.report.run.words import overlap, rows_read

    console = _console()
    data = run.report_data()
    console.print()
    console.print(result_table(data))
    console.print(size_line(data))
    for line in release_lines(data):
        console.print(line, soft_wrap=True)
    for line in flip_lines(data):
        console.print(line, soft_wrap=True)
    for paragraph in rows_read(data):
        console.print(Text(paragraph), soft_wrap=True)
    if sentence := overlap(data):
        console.print(sentence)
    if data.gap is not None:
        console.print(gap_line(data))
    for arm, grid in data.grids.items():
        console.print(grid_line(arm, grid), soft_wrap=True)
    if sentence := engines_line(data):
        console.print(sentence, soft_wrap=True)
    if data.correction is not None:
        console.print(data.correction.verdict, soft_wrap=True)
    if data.forgetting is not None:
        console.print(data.forgetting.verdicts["text"], soft_wrap=True)
        if data.forgetting.kl:
            console.print(divergence_line(data), soft_wrap=True)
    if stages:
        console.print(_stage_table(run))
    num_run = sum(not stage["skipped"] for stage in run.stages())
    peak = run.record["peak_rss_bytes"]
    memory = f", peak memory {peak / 2**30:.1f} GiB" if peak else ""
    console.print(f"\n{num_run} of {len(run.stages())} steps ran, {run.record['wall_s']:.0f} s{memory}.")
    if longest := _longest(run):
        console.print(f"Took longest: {longest}.", soft_wrap=True)
    console.print(f"Report: {short(run.report_path)}", soft_wrap=True)


def _longest(run: Run, num_steps: int = 4) -> str:
    """The steps of this run that took longest, side by side with others or not; "" where all were reused."""
    ran = sorted((stage for stage in run.stages() if not stage["skipped"]), key=lambda stage: -stage["wall_s"])
    return ", ".join(f"{stage['name']} {seconds(stage['wall_s'])}" for stage in ran[:num_steps]).replace(THIN, " ")


def _stage_table(run: Run) -> Table:
    table = _plain_table("step", "address", "wall time", "memory", "last run", right=("wall time", "memory"))
    for stage in run.stages():
        table.add_row(
            stage["name"],
            stage["address"],
            seconds(stage["wall_s"]).replace(THIN, " "),
            num_bytes(stage["peak_rss_bytes"]).replace(THIN, " "),
            "reused" if stage["skipped"] else "ran",
        )
    return table


def print_why(why: Why) -> None:
    """Heat map, candidates, channels."""
    from sdft_ray.report.run.why import shown

    _console().print(shown(why))


def print_runs(store: Store, *, as_json: bool = False) -> None:
    """One line per run."""
    records = [store.run(name) for name in store.runs()]
    if as_json:
        print(json.dumps([{"name": r["name"], "created": r["created"], "steps": len(r["steps"])} for r in records]))
        return
    console = _console()
    if not records:
        console.print(f"No runs in {store.url} yet; start with: sdft compress RECIPE", soft_wrap=True)
        return
    table = _plain_table("run", "created", "steps", "wall time", right=("steps", "wall time"))
    for record in records:
        created = record["created"][:16].replace("T", " ")
        table.add_row(record["name"], created, str(len(record["steps"])), f"{record['wall_s']:.0f} s")
    console.print(table)


def print_verification(store: Store, name: str) -> bool:
    """Check every artifact of a run; True if all are intact."""
    console = _console()
    intact = True
    for step, entry in store.run(name)["steps"].items():
        damaged = store.damaged_files(entry["address"])
        intact &= not damaged
        verdict = "[green]intact[/]" if not damaged else f"[red]damaged[/]: {', '.join(damaged)}"
        console.print(f"{step:<18} {entry['address']:<28} {verdict}", soft_wrap=True)
    if not intact:
        console.print(f"Remove the damaged folders in {store.url} and run the recipe again.", soft_wrap=True)
    return intact


def print_gates(
    teacher: Path | None, seed_set: str = "mixed", learning_rate: float | None = None, *, as_json: bool
) -> bool:
    """The four gates with their values; True if all pass.

    For another teacher than the built-in one, those of the quickstart's set and rate are written to its record.
    """
    from sdft_ray.lab.export import TEACHER
    from sdft_ray.lab.gates import check, plain_values, record_gates

    def tell(words: str) -> None:
        print(f"{words} ...", file=sys.stderr, flush=True)

    gates = check(teacher or TEACHER, seed_set, learning_rate=learning_rate, tell=tell)
    if teacher is not None and (seed_set, learning_rate) == ("mixed", None):
        record_gates(teacher, gates)
    if as_json:
        print(json.dumps(plain_values(gates), indent=2))
        return all(gate.passed for gate in gates)
    table = _plain_table("gate", "bound", "values", "")
    for gate in gates:
        values = ", ".join(f"{name} {value:.3f}" for name, value in gate.values.items())
        table.add_row(gate.name, gate.bound, values, "[green]passes[/]" if gate.passed else "[red]fails[/]")
    _console().print(table)
    return all(gate.passed for gate in gates)


def train_teacher(directory: Path, num_threads: int) -> bool:
    """Train a laboratory teacher, print its progress, and check its gates."""
    from sdft_ray.lab.teacher import train_teacher as train
    from sdft_ray.training.plan import StepRecord

    console = _console()
    started = time.monotonic()

    def report(record: StepRecord) -> None:
        if record.step % 100 == 0:
            minutes = (time.monotonic() - started) / 60
            console.print(f"step {record.step}: loss {record.loss:.3f}, {minutes:.1f} min")

    record = train(directory, num_threads=num_threads, report=report)
    console.print(
        f"trained {directory} on {record['num_tokens'] / 1e6:.1f} M tokens in {record['wall_s'] / 60:.0f} min; "
        "checking its gates",
        soft_wrap=True,
    )
    return print_gates(directory, as_json=False)


def print_service(settings: ServeSettings, engines: Engines, url: str, took_s: float) -> None:
    """The served models, the address, and an example request."""
    console = _console()
    table = _plain_table("model", "source", "engine", "draft")
    for model in settings.models:
        engine = engines[model.name].words if model.name in engines else model.engine.kind
        table.add_row(model.name, model.source, engine, model.draft.source if model.draft else "")
    console.print(table)
    key = (
        "" if settings.access.allow_anonymous or not settings.access.keys_file else " -H 'Authorization: Bearer sk-...'"
    )
    body = json.dumps({"model": settings.models[0].name, "messages": [{"role": "user", "content": "Hello"}]})
    console.print(f"\nReady at [bold]{url}[/] (web page) after {took_s:.0f} s; API at {url}/v1", soft_wrap=True)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        soft_wrap=True,
        markup=False,
    )


def print_keys(keys: Sequence[Key]) -> None:
    """Names and limits of keys."""
    table = _plain_table(
        "name", "expires", "models", "requests/min", "tokens/min", right=("requests/min", "tokens/min")
    )
    for key in keys:
        limits = [f"{limit:,}" if limit else "" for limit in (key.requests_per_minute, key.tokens_per_minute)]
        table.add_row(
            key.id, f"{key.expires:%Y-%m-%d}" if key.expires else "never", ", ".join(key.models or ("all",)), *limits
        )
    _console().print(table)


def print_scores(scores: Scores, *, as_json: bool) -> None:
    """One line per task, with the standard error."""
    if as_json:
        print(json.dumps(scores.to_json()))
        return
    table = _plain_table("task", "metric", "score", "stderr", "items", right=("score", "stderr", "items"))
    for name, score in scores.tasks.items():
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(name, score.metric, f"{score.value:.4f}", stderr, f"{score.n:,}")
    _console().print(table)


def print_comparison(rows: Sequence[Row], *, as_json: bool) -> None:
    """One line per model; ratios are to the first model with the same number of clients."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    columns = ("clients", "tokens/s", "ratio", "first", "median", "per step", "same")
    table = _plain_table("model", *columns, right=columns)
    first: dict[int, float] = {}
    for row in rows:
        ratio = row.tokens_per_s / first.setdefault(row.clients, row.tokens_per_s)
        table.add_row(
            row.model,
            str(row.clients),
            f"{row.tokens_per_s:,.1f}",
            f"{ratio:.2f}",
            f"{1000 * row.median_first_s:.0f} ms",
            f"{row.median_s:.2f} s",
            "" if row.acceptance_length is None else f"{row.acceptance_length:.2f}",
            f"{100 * row.same_share:.0f} %",
        )
    console = _console()
    console.print(table)
    notes = ["first: time to first token; same: answers identical to those of the first model"]
    if any(row.acceptance_length is not None for row in rows):
        notes.append("per step: tokens per decoding step of the model, its own and the accepted ones of the draft")
    console.print("\n".join(notes), style="dim")
