"""lm-eval tasks by name: its own, and those of a folder of YAML files, loaded from their plans (`task_files`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from datasets.exceptions import DatasetNotFoundError, DatasetsError
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from sdft_ray.data.decontamination import MIN_WORDS, words
from sdft_ray.errors import EvaluationError, UserError
from sdft_ray.evaluation.progress import quiet
from sdft_ray.evaluation.task_data import hub_data, is_local, with_local_files, with_rows
from sdft_ray.evaluation.task_modules import importable, with_functions
from sdft_ray.evaluation.task_needs import check_needs
from sdft_ray.evaluation.task_plans import GroupPlan, Plan, TaskPlaces, tasks_of

_CANNOT_LOAD = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ImportError,
    TemplateError,
    DatasetsError,
)
"""What lm-eval and datasets raise for a task file or data that is not as it should be."""

_NOT_HERE = (ConnectionError, DatasetNotFoundError)
"""What they raise when data of the hub cannot be had."""


Plans = Mapping[str, Sequence[Plan]]
Shots = Mapping[str, int | None]
"""Number of few-shot examples by the name asked for; None or no entry: the task's own."""


def load_tasks(
    names: Sequence[str], places: TaskPlaces, shots: Shots | None = None, plans: Plans | None = None
) -> dict[str, list[Task | Group]]:
    """What each name stands for, with its data; `plans` are those of `places` where they are known.

    A task or group stands for itself, a tag for its tasks. A name in the folder of task files hides lm-eval's task of
    the same name. Modules of task files are importable as long as the caller keeps `importable`. Raises
    `EvaluationError` for an unknown name (with the nearest ones), a folder without task files, a task file that cannot
    be read, and missing data.
    """
    plans = plans or places.library().plans(names)
    manager = TaskManager(include_defaults=False)
    loaded: dict[str, list[Task | Group]] = {}
    for name, parts in plans.items():
        build = partial(_built, manager, places, (shots or {}).get(name))
        try:
            loaded[name] = [build(plan) for plan in parts]
        except UserError:
            raise
        except _CANNOT_LOAD as error:
            if isinstance(error, ModuleNotFoundError):
                raise EvaluationError(
                    f"task {name!r} needs the Python module {error.name}, which is not installed",
                    "install it; `pip install 'sdft_ray[eval]'` brings those of lm-eval's own tasks",
                ) from error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, KeyError):
                reason = f"there is no split or column {reason}"
            if isinstance(error, _NOT_HERE):
                raise EvaluationError(
                    f"the data of task {name!r} is not in the Hugging Face cache and cannot be downloaded: {reason}",
                    "give a folder with it (evaluate.data), or download it on a machine with a network and copy the "
                    "cache (HF_HOME)",
                ) from error
            raise EvaluationError(
                f"task {name!r} cannot be loaded: {reason}",
                "check the task file, and that its data can be downloaded from here",
            ) from error
    return loaded


def _built(manager: TaskManager, places: TaskPlaces, shots: int | None, plan: Plan) -> Task | Group:
    """A task from its whole configuration, as lm-eval takes it; a group of such tasks."""
    origin = places.origin
    if isinstance(plan, GroupPlan):
        config = {name: with_functions(part.value, origin) for name, part in plan.fields.items()}
        group = Group.from_config({**config, "group": plan.name})
        for member in plan.members:
            group.add(_built(manager, places, shots, member))
        return group
    check_needs(plan, origin)
    plan, _ = with_local_files(plan, origin)
    if places.data is not None and (found := hub_data(plan, places.data, shots)) is not None:
        plan = with_rows(plan, found)
    config = {name: with_functions(part.value, origin) for name, part in plan.fields.items()}
    return manager.load([config])["tasks"][plan.name]


def leaf_tasks(loaded: Sequence[Task | Group]) -> list[Task]:
    """The tasks themselves, groups taken apart."""
    return [task for part in loaded for task in (part.get_all_tasks() if isinstance(part, Group) else [part])]


def task_questions(names: Sequence[str], places: TaskPlaces) -> Iterator[tuple[str, ...]]:
    """What the models are asked: the texts of every document that the tasks are scored on, one after the other.

    All documents count, whatever limit an evaluation has; few-shot examples do not. Raises as `load_tasks` does.
    """
    plans = places.library().plans(names)
    with importable([task for parts in plans.values() for task in tasks_of(parts)], places.origin):
        for parts in load_tasks(names, places, dict.fromkeys(names, 0), plans).values():
            for task in leaf_tasks(parts):
                for doc in task.eval_docs:
                    yield _question(task, doc)


def _question(task: Any, doc: Any) -> tuple[str, ...]:
    """The fields of a document that its question shows, and the one that the task itself names for this use.

    The rendered question holds the template's words too, in some tasks whole worked examples (TruthfulQA), which
    are nobody's test question. It counts only where no field is long enough to be looked for.
    """
    shown, options = task.doc_to_text(doc), ()
    if not isinstance(shown, str):  # the number of an option, and the options are the questions (WinoGrande)
        shown, options = "", tuple(map(str, task.doc_to_choice(doc)))
    named = task.get_config("doc_to_decontamination_query")
    fields = {name: text for name, text in doc.items() if isinstance(text, str) and text.strip()}
    asked = (text for name, text in fields.items() if name == named or text.strip() in shown)
    texts = (*options, *asked)
    return texts if any(len(words(text)) >= MIN_WORDS for text in texts) else (*texts, shown)


def check_tasks(names: Sequence[str], places: TaskPlaces, shots: Shots, metrics: Mapping[str, str | None]) -> None:
    """Raise `EvaluationError` for what `load_tasks` would refuse, and for metrics that a task does not have.

    Tasks whose data would have to be fetched from the hub are not loaded: of those, names and task files are checked.
    """
    plans = places.library().plans(names)
    local = {name: parts for name, parts in plans.items() if all(is_local(task, places) for task in tasks_of(parts))}
    with quiet(), importable([task for parts in local.values() for task in tasks_of(parts)], places.origin):
        for name, parts in (load_tasks(list(local), places, shots, local) if local else {}).items():
            check_metric(name, leaf_tasks(parts), metrics.get(name))


def check_metric(name: str, leaves: Sequence[Task], metric: str | None) -> None:
    """Raise `EvaluationError` for a metric that the tasks behind a name do not have."""
    known = sorted({metric for task in leaves for metric in (task.aggregation() or ())})
    if metric is not None and known and metric.partition(",")[0] not in known:
        raise EvaluationError(f"task {name!r} has no metric {metric!r}", f"it has {', '.join(known)}")
