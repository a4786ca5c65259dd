"""Ctrl-C and SIGTERM at any moment of a command: one line, and the same exit code."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

INTERRUPTED = """
import os, time
from sdft_ray.cli.app import run_command

def work() -> None:
    os.kill(os.getpid(), {number})
    time.sleep(60)

run_command(work)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_a_word(number: signal.Signals) -> None:
    program = INTERRUPTED.format(number=int(number))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip() == "sdft: interrupted → finished work is kept; run the same command again to continue"
