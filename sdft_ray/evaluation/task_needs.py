"""What tasks need beside their data: files of nltk, without which lm-eval would stop at the scores, or fetch them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.task_files import Origin, functions_in
from sdft_ray.evaluation.task_modules import path_of
from sdft_ray.evaluation.task_plans import TaskPlan

_LOOKED_UP = re.compile(r"""nltk\.data\.find\(\s*["']([\w/]+)["']""")


def check_needs(task: TaskPlan, origin: Origin) -> None:
    """Raise `EvaluationError` where modules beside a task's functions look up nltk files that are not here.

    lm-eval's IFEval counts words by them. It downloads them when it is imported, and without a network goes on: the
    first answer that needs them would end the evaluation, when all answers are there.
    """
    for name in dict.fromkeys(_looked_up(task, origin)):
        if not _is_here(name):
            file = name.rpartition("/")[2]
            raise EvaluationError(
                f"task {task.name!r} needs nltk's {file}, which is not on this machine",
                f"run `python -m nltk.downloader {file}` where there is a network, put the folder nltk_data that it "
                "writes on every machine and name it in NLTK_DATA, or leave the task out",
            )


def _looked_up(task: TaskPlan, origin: Origin) -> Iterator[str]:
    functions = (function for part in task.fields.values() for function in functions_in(part.value))
    folders = {path.parent for function in functions if (path := path_of(function, origin)) is not None}
    for folder in sorted(folders):
        for module in sorted(folder.glob("*.py")):
            yield from _LOOKED_UP.findall(module.read_text(encoding="utf-8", errors="replace"))


def _is_here(name: str) -> bool:
    import nltk

    try:
        nltk.data.find(name)
    except LookupError:
        return False
    return True
