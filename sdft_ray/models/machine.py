"""What this process may have of the machine: memory, CPUs, GPUs. Needs neither torch nor Ray.

Memory is what is free now: other programs keep what they hold. Caches of files count as free, as the kernel gives them
up. In a container the smallest limit of the own control group and all groups above it counts (cgroup v1 and v2).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")
_NVIDIA_SMI_S = 10.0


@dataclass(frozen=True)
class Machine:
    """One machine. Bytes of main memory that may be taken now, and in all; free bytes of each GPU.

    `is_limited`: memory is the limit of a control group, or was given by the user, and not all that the machine has.
    """

    cpus: int
    memory_bytes: int
    total_bytes: int
    gpu_bytes: tuple[int, ...] = ()
    is_limited: bool = False

    @property
    def taken_bytes(self) -> int:
        """What other programs hold."""
        return max(0, self.total_bytes - self.memory_bytes)


def this_machine(*, cpus: int | None = None, memory_bytes: int | None = None) -> Machine:
    """The machine that this process runs on. `cpus` and `memory_bytes` are limits that the user gives a run."""
    memory = psutil.virtual_memory()
    free, total, is_limited = free_memory(), memory.total, False
    for limit, _ in group_limits():
        if limit < total:
            total, is_limited = limit, True
    if memory_bytes is not None and memory_bytes < free:
        free, total, is_limited = memory_bytes, memory_bytes, True
    return Machine(cpus or local_cpus(), free, total, gpu_memory(), is_limited)


def free_memory() -> int:
    """Bytes that processes like this one can still take."""
    return min([psutil.virtual_memory().available, *(left for _, left in group_limits())])


def local_cpus() -> int:
    """CPUs that this process may use, where the system tells, else CPUs of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def group_limits(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, bytes left) of each control group that limits the memory of this process, its own first.

    Empty where there are none, or the system is not Linux.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            found += [_of_group(folder, _V2) for folder in _upwards(root, place)]
        elif "memory" in controllers.split(","):
            found += [_of_group(folder, _V1) for folder in _upwards(root / "memory", place)]
    return [limits for limits in found if limits is not None]


def _upwards(root: Path, place: str) -> Iterator[Path]:
    """The folder of a group and of all above it. Inside a container the mount may begin at the own group."""
    folder = root / place.lstrip("/")
    yield from (part for part in (folder, *folder.parents) if part == root or root in part.parents)


def _of_group(folder: Path, names: tuple[str, str, str, str]) -> tuple[int, int] | None:
    limit_file, usage_file, *cached = names
    try:
        text = (folder / limit_file).read_text(encoding="ascii").strip()
        if text == "max" or int(text) >= _UNLIMITED:
            return None
        usage = int((folder / usage_file).read_text(encoding="ascii"))
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    files = sum(int(stat.get(name, 0)) for name in cached)
    return int(text), max(0, int(text) - max(0, usage - files))


def gpu_memory() -> tuple[int, ...]:
    """Free bytes of each GPU of NVIDIA that this process may use, asked of the driver's own tool; () without one."""
    tool = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible in ("", "-1", "NoDevFiles"):
        return ()
    command = [tool, "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.count(",") == 2]
    wanted = None if visible is None else [name.strip() for name in visible.split(",")]
    return tuple(
        int(free) * 2**20
        for index, uuid, free in rows
        if free.isdigit() and (wanted is None or index in wanted or any(uuid.startswith(name) for name in wanted))
    )
