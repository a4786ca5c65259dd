"""A training job whose workers get little memory: a real limit of the operating system, which allocations run into."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from sdft_ray.stages.job import StageContext

Limit = Literal["address space", "cgroup"]
CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
"""Where the memory controller is mounted: version 1, and 2."""


@dataclass(frozen=True)
class LimitedJob(StageContext):
    """From when it asks for the model to train, a worker may take `room_bytes` more, once the file `switch` exists.

    `address space`: allocations beyond fail. `cgroup`: the kernel kills the worker; what it had before is not counted.
    """

    switch: str = ""
    room_bytes: int = 0
    limit: Limit = "address space"

    def model(self, role: str) -> Path:
        if role == "pruned" and Path(self.switch).exists():
            if self.limit == "address space":
                most = psutil.Process().memory_info().vms + self.room_bytes
                resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            else:
                (_cgroup(self.switch) / "cgroup.procs").write_text(str(os.getpid()))
        return super().model(role)


def _cgroup(switch: str) -> Path:
    return next(root for root in CGROUPS if (root / "cgroup.procs").exists()) / f"sdft_{Path(switch).parent.name}"


def make_cgroup(switch: Path, room_bytes: int) -> Path:
    """A cgroup of so much memory, for the workers of a job. Raises `OSError` where that is not allowed."""
    group = _cgroup(str(switch))
    group.mkdir()
    most = group / "memory.limit_in_bytes"
    try:
        (most if most.exists() else group / "memory.max").write_text(str(room_bytes))
    except OSError:
        group.rmdir()
        raise
    return group


@dataclass(frozen=True)
class Told:
    """A job's `Progress` that keeps the sentences for the user in a file."""

    path: str

    def __call__(self, done: int, total: int, unit: str) -> None:
        """Nobody counts."""

    def phase(self, text: str) -> None:
        """Nor asks what is done."""

    def part(self, name: str) -> Told:
        return self

    def tell(self, sentence: str) -> None:
        with Path(self.path).open("a", encoding="utf-8") as file:
            file.write(sentence + "\n")
