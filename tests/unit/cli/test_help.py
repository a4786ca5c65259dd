"""Help pages of `sdft` and of the entry points in `jobs/`: complete, at every width, and with the same exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sdft_ray.cli.app import app

ROOT = Path(__file__).resolve().parents[3]


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    yield words, command
    for name, part in getattr(command, "commands", {}).items():
        yield from commands(part, (*words, name))


ALL = dict(commands(get_command(app)))


def words_of(text: str) -> list[str]:
    return re.sub(r"[^\w$/.:`'-]+", " ", text).split()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_help_page_shows_all_of_its_text(words: tuple[str, ...], columns: int) -> None:
    page = CliRunner(env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}).invoke(app, [*words, "--help"])
    assert page.exit_code == 0
    assert max(map(len, page.output.splitlines())) <= columns
    shown = words_of(page.output)
    command = ALL[words]
    texts = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]
    assert all(texts), "every parameter has a help text"
    for parameter in command.params:
        assert [option for option in parameter.opts if option.startswith("-") and option not in shown] == []
    for text in texts:
        missing = [word for word in words_of(text) if word not in shown]
        assert not missing, "markup must not swallow it, nor a narrow terminal cut it off"


def run(job: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, ROOT / "jobs" / f"{job}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "arguments"), [("compress", "{RECIPE}"), ("study", "{STUDY}"), ("stage", "{RECIPE} {STEP}")]
)
def test_an_entry_point_has_a_help_page_of_its_own(job: str, arguments: str) -> None:
    page = run(job, "--help")
    assert page.returncode == 0, page.stderr
    assert f"Usage: {job}.py [OPTIONS] {arguments}" in page.stdout
    for option in ("--resources", "--store", "--progress"):
        assert option in page.stdout


@pytest.mark.slow
def test_an_entry_point_reports_mistakes_as_the_command_does(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    for job, more in (("compress", []), ("study", []), ("stage", ["generate"])):
        done = run(job, missing, *more)
        assert done.returncode == 2
        assert done.stderr.startswith("sdft: ")
        assert "none.yaml" in done.stderr
        assert " → " in done.stderr, "a next step"
        assert "Traceback" not in done.stderr
    assert run("stage", missing).returncode == 2, "STEP is missing"


def test_every_command_that_takes_a_recipe_or_a_study_takes_local_data() -> None:
    parameters = {words[-1]: {part.name for part in command.params} for words, command in ALL.items() if words}
    taking = {name for name, names in parameters.items() if {"recipe", "file"} & names and "resources" in names}
    assert taking == {"compress", "explain", "try", "submit", "study"}
    assert {name for name in taking if "data" not in parameters[name]} == set()
