"""The model card of a student: README.md of a Hugging Face repository, front matter and all.

The template decides the order of things, this file the figures and the sentences. Whatever a user wrote is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sdft_ray.evaluation.rounds import ratio
from sdft_ray.models.companions import is_licence
from sdft_ray.recipe.arms import Train
from sdft_ray.release import card_words
from sdft_ray.release.card_facts import CardFacts, Origin
from sdft_ray.report.run import words
from sdft_ray.report.run.model import PRUNED, TEACHER, ReportData
from sdft_ray.report.run.tables import selection_table
from sdft_ray.report.run.words import about_means, mean_score, overlap, ranked_arms
from sdft_ray.report.toolbox.markdown import Raw, code, escaped, fenced, plain
from sdft_ray.report.toolbox.numbers import count, number, percent, percent_error
from sdft_ray.statistics.estimate import Estimate
from sdft_ray.statistics.scores import Scores

_FOLDER = "path/to/this/folder"
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def model_card(
    data: ReportData,
    student: str,
    facts: CardFacts,
    *,
    repository: str = "",
    releasable: bool | None = None,
    reasons: Sequence[str] = (),
) -> str:
    """The card of `student`, an arm or a merge of the run that `data` shows.

    `repository` is OWNER/NAME on the hub, "" elsewhere. `releasable` says whether the student met the release bounds
    of its recipe, None that nobody judged; `reasons` are the bounds that it missed, in words.
    """
    title = repository or f"{data.name}: {student}"
    told = {True: "met", False: "missed, see above", None: "not judged"}[releasable]
    context = {**_context(data, student, facts, repository), "released": told}
    body = _environment().get_template("model_card.md.j2").render(context)
    warning = card_words.release(releasable, reasons)
    return f"---\n{_front_matter(data, student, facts, title)}\n---\n\n# {escaped(title)}\n\n{warning}{body}"


@cache
def _environment() -> Environment:
    """Nothing reaches the page but by `escaped`: an expression of the template is Markdown only if it is `Raw`.

    Not `huggingface_hub.ModelCard.from_template`: it renders in an environment of its own, without `finalize`, so that
    every name a user wrote would be interpreted.
    """
    environment = Environment(  # noqa: S701  (Markdown, not HTML; `finalize` escapes both)
        loader=FileSystemLoader(Path(__file__).parent),
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, percent=percent, cells=_cells)
    return environment


def _front_matter(data: ReportData, student: str, facts: CardFacts, title: str) -> str:
    """YAML for the hub. A teacher that is not on the hub cannot be its `base_model`.

    The hub knows four relations (finetune, adapter, merge, quantized): a pruned and recovered model is a finetune.
    """
    from huggingface_hub import EvalResult, ModelCardData

    teacher, licence = facts.teacher, facts.licence
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=plain(score.task),
            dataset_name=plain(score.task),
            metric_type=plain(score.metric),
            metric_name=plain(f"{score.metric}, {_shots(score.num_fewshot)}, share in [0, 1]"),
            metric_value=round(score.value, 4),
        )
        for score in facts.scores.get(student, Scores({})).tasks.values()
    ]
    named = facts.seed_set.name
    fields: dict[str, Any] = {
        "base_model": teacher.name or None,
        "base_model_relation": "finetune" if teacher.name else None,
        "datasets": [named] if "/" in named else None,
        "library_name": "transformers",
        "license": licence.identifier if licence else "other",
        "license_name": (licence.name or None) if licence else "same-as-the-teacher",
        "license_link": _licence_link(facts),
        "pipeline_tag": "text-generation",
        "tags": card_words.tags(data, student, facts.recipe),
        "model_name": plain(title),
        "eval_results": results or None,
    }
    return ModelCardData(**fields).to_yaml()


def _licence_link(facts: CardFacts) -> str | None:
    """Where a licence that the hub has no identifier for can be read: its link, a file of ours, the teacher's page."""
    if facts.licence is not None and (facts.licence.identifier != "other" or "://" in facts.licence.link):
        return facts.licence.link or None
    own = min(filter(is_licence, facts.files), key=lambda name: "licen" not in name.lower(), default=None)
    return own or (f"https://huggingface.co/{facts.teacher.name}" if facts.teacher.name else None)


def _context(data: ReportData, student: str, facts: CardFacts, repository: str) -> dict[str, Any]:
    recipe, mean = facts.recipe, data.recovery[student].mean if student in data.recovery else None
    return {
        "data": data,
        "student": student,
        "facts": facts,
        "name_in_python": Raw(json.dumps(plain(repository) or _FOLDER)),
        "name_in_shell": Raw(shlex.quote(plain(repository) or _FOLDER)),
        "teacher": _teacher_words(facts.teacher, recipe.teacher.model),
        "seed_set": _seed_words(facts.seed_set, facts.num_seed_rows),
        "mean": percent_error(mean.value, mean.stderr) if mean and mean.value is not None else "",
        "worst": next(((figure, task) for name, figure, task in words.worst(data) if name == student), None),
        "sizes": words.size_rows(data.sizes.teacher, data.sizes.pruned) if data.sizes else [],
        "fewer": _fewer(data),
        "speedup": _speedup(data),
        "pruning": words.pruning_words(data),
        "kept_blocks": list(data.plan.keep_blocks) if data.plan and not data.earlier else [],
        "learnt": card_words.learnt(data, student, recipe),
        "settings": _settings_words(recipe.train, facts.training) if student in recipe.train.arms else "",
        "rewritten": card_words.uses_rewrites(student, recipe),
        "rewriting": card_words.rewriting(recipe, facts.generation),
        "selection": selection_table(data),
        "overlap": overlap(data),
        "table": _table(data, student, facts),
        "written": _written(facts.scores, student),
        "asked": card_words.asked(recipe, facts.scores),
        "limitations": card_words.limitations(data, student, facts),
        "others": [(name, percent_error(r.value, r.stderr)) for name, r in ranked_arms(data) if name != student],
        "papers": card_words.papers(data, student, recipe),
        "recipe_yaml": fenced(recipe.to_yaml(), "yaml"),
        "has_chat": recipe.evaluate.apply_chat_template,
        "dtype": recipe.teacher.dtype,
    }


def _teacher_words(origin: Origin, model: str) -> Raw:
    """A link to the hub, or the name of a folder with the digest of what it held."""
    if origin.name:
        commit = f" at commit `{origin.commit[:12]}`" if origin.commit else ""
        return Raw(f"[{escaped(origin.name)}](https://huggingface.co/{origin.name}){commit}")
    name = code(Path(model).name)
    digest = f", content sha256 `{origin.digest[:16]}…`" if origin.digest else ""
    return Raw(f"{name} (a checkpoint that is not on the hub{digest})")


def _seed_words(origin: Origin, num_rows: int | None) -> Raw:
    told = f"{num_rows:,} rows of " if num_rows else ""
    if "/" in origin.name:
        link = f"[{escaped(origin.name)}](https://huggingface.co/datasets/{origin.name})"
        return Raw(told + link + (f" at commit `{origin.commit[:12]}`" if origin.commit else ""))
    if origin.name or origin.url:
        return Raw(told + code(origin.name or origin.url))
    digest = f" (sha256 `{origin.digest[:16]}…`)" if origin.digest else ""
    return Raw(f"{told}a data set that was not published with the model{digest}")


def _fewer(data: ReportData) -> str:
    """31.2 % fewer parameters (2.42 M → 1.66 M); "" without sizes."""
    if data.sizes is None:
        return ""
    before, after = data.sizes.teacher.num_parameters, data.sizes.pruned.num_parameters
    return f"{percent(1 - after / before)} fewer parameters ({count(before)} → {count(after)})"


def _speedup(data: ReportData) -> str:
    """1.41 times as fast with 1 sequence at once, 1.38 times with 16; "" where it was not measured."""
    if data.speed is None:
        return ""
    parts = [
        f"{number(ratio(now.decode, was.decode).median, 2)} times as fast with {count(was.batch_rows)} at once"
        for was, now in data.speed.batches
    ]
    return ", ".join(parts)


def _settings_words(train: Train, summary: Mapping[str, Any]) -> str:
    """How long and with what it was trained."""
    steps = summary.get("num_steps") or train.num_steps
    length = f"{steps:,} steps" if steps else f"{train.num_epochs:g} epochs in steps"
    tokens = summary.get("num_loss_tokens")
    seen = f", {tokens:,} response tokens in all" if tokens else ""
    part = "all weights were tuned"
    if train.lora is not None:
        part = f"LoRA of rank {train.lora.rank}, folded into the weights"
    elif train.train_last_n_layers is not None:
        part = f"the output head and the last {train.train_last_n_layers} blocks were tuned"
    how = f"{_OPTIMIZERS.get(train.optimizer, train.optimizer)} with a {train.schedule} schedule"
    return f"{length} of {train.step_rows:,} packed rows of {train.max_seq_len:,} tokens{seen}; {how}; {part}."


@dataclass(frozen=True)
class _Row:
    """One task, or the mean over all: scores in per cent and recovery."""

    name: Raw | str
    asked: str
    cells: tuple[str, ...]


def _table(data: ReportData, student: str, facts: CardFacts) -> list[_Row]:
    """Task by task: teacher, pruned, student, recovery; then the means. Empty without scores."""
    names = (TEACHER, PRUNED, student)
    kept = data.recovery.get(student)
    table = []
    for task in data.tasks if student in data.scores else ():
        score = facts.scores[student].tasks[task]
        asked = f"{score.metric}, {_shots(score.num_fewshot)}, {score.n:,} items"
        unit = 1 if task in data.not_averaged else 100
        cells = [_figure(data.scores.get(name, {}).get(task), unit) for name in names]
        table.append(_Row(code(task), asked, (*cells, _figure(kept.tasks.get(task) if kept else None))))
    if table:
        cells = [_figure(mean_score(data, name, data.tasks)) for name in names]
        table.append(_Row("mean", about_means(data), (*cells, _figure(kept.mean if kept else None))))
    return table


def _cells(cells: Sequence[str]) -> Raw:
    """The cells of a table's row, without the bars at both ends."""
    return Raw(" | ".join(escaped(cell) for cell in cells))


def _figure(value: Estimate | None, unit: float = 100) -> str:
    """91.5 ± 2.0, in per cent unless `unit` is 1; a dash where nothing is known."""
    if value is None or value.value is None:
        return "–"
    error = "" if value.stderr is None else f" ± {number(unit * value.stderr, 1)}"
    return f"{number(unit * value.value, 1)}{error}"


def _shots(num_fewshot: int | None) -> str:
    return "shots as the task has them" if num_fewshot is None else f"{num_fewshot}-shot"


def _written(scores: Mapping[str, Scores], student: str) -> list[_Row]:
    """How generated answers of teacher and student look, task by task; empty where none were looked at."""
    table = []
    for task in scores.get(student, Scores({})).tasks.values():
        for model in (TEACHER, student):
            other = scores[model].tasks.get(task.task) if model in scores else None
            if task.written is None or other is None or other.written is None:
                continue
            w = other.written
            shares = (percent(share) for share in (w.truncated, w.no_answer, w.repetition))
            table.append(_Row(code(task.task), model, (number(w.mean_tokens, 1), *shares)))
    return table
