"""What this process may have of the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sdft_ray.models import machine
from sdft_ray.models.machine import group_limits, this_machine

MIB = 2**20


def _files(folder: Path, **content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n", encoding="ascii")


def test_limits_of_the_own_group_and_those_above_it(tmp_path: Path) -> None:
    """Version 2. Pages of files count as free; a group without limit says nothing."""
    root, groups = tmp_path / "fs", tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    stat = f"anon 5\ninactive_file {100 * MIB}\nactive_file {50 * MIB}"
    _files(root / "outer/inner", memory__max=1000 * MIB, memory__current=400 * MIB, memory__stat=stat)
    _files(root / "outer", memory__max=800 * MIB, memory__current=700 * MIB, memory__stat="anon 5")
    _files(root, memory__max="max", memory__current=MIB, memory__stat="anon 5")
    assert group_limits(root, groups) == [(1000 * MIB, 750 * MIB), (800 * MIB, 100 * MIB)]


def test_limits_of_version_1(tmp_path: Path) -> None:
    root, groups = tmp_path / "fs", tmp_path / "cgroup"
    groups.write_text("4:cpu,memory:/job\n1:pids:/job\n")
    stat = f"total_inactive_file {10 * MIB}\ntotal_active_file {10 * MIB}"
    _files(
        root / "memory/job",
        memory__limit_in_bytes=500 * MIB,
        memory__usage_in_bytes=120 * MIB,
        memory__stat=stat,
    )
    _files(root / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=1, memory__stat=stat)
    assert group_limits(root, groups) == [(500 * MIB, 400 * MIB)]
    assert group_limits(root, tmp_path / "none") == []


def test_a_limit_makes_the_machine_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "group_limits", lambda: [(600 * MIB, 200 * MIB)])
    found = this_machine(cpus=3)
    assert (found.cpus, found.memory_bytes, found.taken_bytes, found.is_limited) == (3, 200 * MIB, 400 * MIB, True)
    monkeypatch.setattr(machine, "group_limits", list)
    found = this_machine(memory_bytes=100 * MIB)
    assert (found.memory_bytes, found.is_limited) == (100 * MIB, True)
    free = this_machine()
    assert not free.is_limited
    assert free.total_bytes == psutil.virtual_memory().total
    assert 0 < free.memory_bytes < free.total_bytes
