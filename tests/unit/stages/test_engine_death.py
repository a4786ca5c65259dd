"""What an actor does when its engine dies, without Ray: tests/chaos/test_engine.py kills vLLM's engine under one."""

from __future__ import annotations

import sys
from multiprocessing import get_context
from typing import Any, NoReturn

import pyarrow as pa
import pytest

from sdft_ray.generation.sampler import EngineError
from sdft_ray.stages.evaluators import Evaluator
from sdft_ray.stages.rewriter import Rewriter

RAISED = 7


def _die(*_: object) -> NoReturn:
    raise EngineError("its process died")


def _rewrite(has_worked: bool) -> None:
    rewriter: Any = Rewriter.__new__(Rewriter)
    rewriter._has_committed = has_worked
    rewriter._refused = None
    rewriter._answer = _die
    rewriter(pa.table({"chunk": ["a"], "runs": [[0, 1]]}))


def _evaluate(has_worked: bool) -> None:
    evaluator: Any = Evaluator()
    evaluator._has_answered = has_worked
    evaluator._sampler_of = _die
    evaluator.answer(None, [])


ACTORS = {"rewriter": _rewrite, "evaluator": _evaluate}


def _run(actor: str, has_worked: bool) -> None:
    try:
        ACTORS[actor](has_worked)
    except EngineError:
        sys.exit(RAISED)


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize(("has_worked", "exit_code"), [(True, 1), (False, RAISED)])
def test_the_process_ends_with_its_engine_unless_it_never_worked(actor: str, has_worked: bool, exit_code: int) -> None:
    """Ray starts an actor again only when its process is gone; what dies at once would die again."""
    process = get_context("fork").Process(target=_run, args=(actor, has_worked))
    process.start()
    process.join(60)
    assert process.exitcode == exit_code
