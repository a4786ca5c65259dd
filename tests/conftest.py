"""One local Ray for each process of tests, the order of tests, and the rule that nothing is skipped in CI."""

from __future__ import annotations

import atexit
import gc
import os
import secrets
import signal
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.fork_server import ForkServer, fork_server

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way on tiny models
# Ray keeps the first token that a process saw, and looks for it in the current HOME.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# `nohup`, and a shell that starts the tests in the background, ignore Ctrl-C for all processes of theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Otherwise what `datasets` prepares from generated data would stay in the user's cache. It reads this on import.
    _prepared = tempfile.TemporaryDirectory(prefix="sdft_ray_tests_")
    os.environ["HF_DATASETS_CACHE"] = _prepared.name

TESTS = Path(__file__).parent
REQUIRE_ALL = os.environ.get("SDFT_REQUIRE_ALL", "") not in ("", "0")
"""Set in CI: a test that cannot run there fails instead of being skipped."""


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """What starts Ray's workers fast; see `tests/support/fork_server.py`."""
    with fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def local_ray(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of three logical CPUs, which all tests of this process share, with a HOME of its own.

    A test that kills Ray, needs a cluster or settings of its own starts it in a process of its own.
    """
    import ray

    from sdft_ray.recipe.resources import Resources
    from sdft_ray.stages.session import ray_session

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
            # Idle workers stay, so that the next test finds torch and transformers imported. Ray keeps one per CPU.
            patch.setenv("RAY_num_workers_soft_limit", "8")
            stack.enter_context(forks.active())
            stack.enter_context(ray_session(Resources(cpus=3, object_store_bytes=100 * 2**20)))
        yield
    assert not ray.is_initialized()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In one process, quick tests come first and those with Ray last, since Ray stays to the end.

    With several processes it is the other way round: small files then fill what the large ones leave, and all end
    together.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("numerics", "properties"):
            item.add_marker(pytest.mark.slow)
        heavy = folder in ("ray", "chaos", "serve", "browser")
        if heavy and not any(item.get_closest_marker(name) for name in ("slow", "ray", "service")):
            raise pytest.UsageError(f"{item.nodeid} needs a marker: `make fast` does not look into its folder")
    items.sort(
        key=lambda item: [item.get_closest_marker(name) is not None for name in ("ray", "slow")],
        reverse="PYTEST_XDIST_WORKER" in os.environ,
    )


def pytest_collection_finish() -> None:
    """What collection imported lives to the end: the garbage collector need not visit it again and again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise nanobind reports leaks at exit


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if REQUIRE_ALL and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"nothing is skipped where SDFT_REQUIRE_ALL is set: {reason}"
