"""vLLM's own engine process is killed while it answers: the actor starts anew and nothing is lost."""

from __future__ import annotations

import pytest

from tests.support.killed_generation import Case, run, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly]


def test_a_killed_engine_costs_no_row() -> None:
    with serving() as (server, url):
        figures = run(server, url, Case("vllm", 400, "engine", 0.3))
    assert 120 <= figures["rows_done_then"] < 400
    assert figures["rows_kept"] >= 120
