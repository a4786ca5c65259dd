"""Processes of a Ray that was started on this machine."""

from __future__ import annotations

import psutil


def ray_processes(title: str, driver: int | None = None) -> list[psutil.Process]:
    """Those whose title holds `title`, under the process `driver` or this one; what ends while we look is left out."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
