"""Starting a local Ray: a start that fails is tried once more, and then told."""

from __future__ import annotations

from typing import Any

import pytest

from sdft_ray.errors import ResourceError
from sdft_ray.resources import Resources
from sdft_ray.stages import session


@pytest.mark.parametrize(("num_failures", "joining", "num_attempts"), [(1, False, 2), (9, False, 2), (9, True, 1)])
def test_a_local_ray_that_does_not_come_up_is_started_once_more(
    num_failures: int, joining: bool, num_attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it does not come up is the one thing that cannot be had at will, so it is made up here."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        if len(asked) <= num_failures:
            raise RuntimeError("Timed out waiting for file")

    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(session.ray, "nodes", lambda: [{}])
    monkeypatch.setenv("RAY_ADDRESS", "somewhere" if joining else "")
    if num_failures == 1:
        with session.ray_session(Resources()) as capacity:
            assert capacity.cpus == 2
    else:
        with (
            pytest.raises(ResourceError, match=r"cannot (start|join) Ray: Timed out"),
            session.ray_session(Resources()),
        ):
            pass
    assert len(asked) == num_attempts
