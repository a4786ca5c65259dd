"""What libraries print goes to a file, what we say to the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, sys
from pathlib import Path
from sdft_ray.progress import Event, libraries_to, open_run_view

def everybody(what):
    print("python", what)
    print("python", what, file=sys.stderr)
    os.write(1, b"descriptor " + what.encode() + b"\\n")
    os.write(2, b"descriptor " + what.encode() + b"\\n")
    os.system(f"echo child {what}; echo child {what} >&2")

log = Path(sys.argv[1])
everybody("before")
sys.stdout.flush()
with open_run_view(sys.argv[2], ["train"], log) as view:
    everybody("within")
    view.handle(Event("message", detail="ours"))
    with libraries_to(Path("/nowhere/log")):
        everybody("inside")
    view.handle(Event("stage_finished", "train", wall_s=1.0))
everybody("after")
"""


def _run(log: Path, view: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(log), view]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)


def _lines(what: str) -> list[str]:
    return sorted(f"{who} {what}" for who in ("python", "descriptor", "child"))


def test_the_terminal_has_our_words_and_the_file_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "logs/run.log"
    done = _run(log, "plain")
    assert sorted(done.stdout.splitlines()) == sorted(_lines("before") + _lines("after"))
    ours = ["ours", "train: done in 1.0 s"]
    assert sorted(done.stderr.splitlines()) == sorted([*_lines("before"), *_lines("after"), *ours])
    head, *kept = log.read_text(encoding="utf-8").splitlines()
    assert head.startswith("--- ")
    assert sorted(kept) == sorted(2 * (_lines("within") + _lines("inside")))


def test_events_for_machines_go_to_standard_output(tmp_path: Path) -> None:
    done = _run(tmp_path / "run.log", "json")
    assert sum(line.startswith('{"event"') for line in done.stdout.splitlines()) == 2
    assert "within" not in done.stdout + done.stderr


def test_a_log_is_added_to_and_begun_anew_when_it_is_large(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    _run(log, "none")
    _run(log, "none")
    assert log.read_text(encoding="utf-8").count("--- ") == 2
    log.write_bytes(bytes(17 * 2**20))
    _run(log, "none")
    assert log.read_text(encoding="utf-8").count("--- ") == 1
