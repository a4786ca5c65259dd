"""An error of a stage in one sentence of ours: the cause without Ray's wrappings, the log, and what may help."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, UserCodeException, WorkerCrashedError

from sdft_ray.errors import ResourceError, SdftError, StageError, StoreError, UserError
from sdft_ray.generation.engine_errors import cache_error
from sdft_ray.progress.capture import short
from sdft_ray.progress.killed import OUT_OF_MEMORY, RAY_SAYS_LOW, killed, signal_in, signal_words
from sdft_ray.progress.logs import last_words, tail
from sdft_ray.stages.board import WorkerLog
from sdft_ray.stages.spec import STAGES

_LESS_MEMORY = {
    "measure": ("num_tasks", "batch_tokens"),
    "generate": ("max_sequences", "kv_cache_bytes", "max_actors"),
    "gap": ("batch_tokens",),
    "train": ("micro_batch_size", "num_workers"),
    "evaluate": ("max_sequences", "kv_cache_bytes", "num_actors"),
}
"""Part of the resources -> its fields that take less memory when they are lowered."""
_QUOTED_LINES = 200


@dataclass(frozen=True)
class Scene:
    """Where a step failed: its shown name, its stage, the logs of its workers, and the run's log."""

    step: str
    stage: str
    workers: Sequence[WorkerLog] = ()
    log: Path | None = None

    @property
    def section(self) -> str:
        """Part of the resources that describes the workers."""
        return STAGES[self.stage].workers if self.stage in STAGES else ""


def as_ours(scene: Scene, failure: BaseException) -> SdftError:
    """A user's error as it is, anything else as a `StageError`, or as `ResourceError` where an engine finds no room."""
    seen = failure
    while (inner := _inside(seen)) is not None:
        seen = inner
    if isinstance(seen, UserError):
        return seen
    text = str(seen).strip()
    if "No space left on device" in text:  # torch and safetensors wrap the error number away
        last = (text.splitlines() or [""])[-1]
        return StoreError(f"{scene.step}: {last}", "free some space and run again; finished steps are reused")
    logged = _kept_logs(scene, text)
    if room := cache_error(f"{text}\n{logged}", scene.section):
        message, hint = room
        return ResourceError(f"{scene.step}: {message}{_named(scene)}", f"{hint}, in the resources file")
    reason, hint = _told(scene, seen, text, logged)
    error = StageError(scene.step, reason, hint, short(scene.log) if scene.log else "")
    error.__cause__ = failure
    return error


def _inside(error: BaseException) -> BaseException | None:
    """The error that a wrapper of Ray holds: a task's cause, a rank's own, the worst of a training run's ranks.

    What Ray Data wraps has lost its cause on the way: the wrapper's own text quotes it.
    """
    for name in ("cause", "_base_exc", "controller_failure"):
        held = getattr(error, name, None)
        if isinstance(held, BaseException):
            return held if not isinstance(held, UserCodeException) else held.__cause__
    failures = getattr(error, "worker_failures", None)
    return min(failures.values(), key=_rank, default=None) if failures else None


def _rank(error: BaseException) -> int:
    """Of the errors of several workers the one that led to the others comes first: these have lost a connection."""
    while (inner := _inside(error)) is not None:
        error = inner
    kinds = (UserError, OutOfMemoryError, RayActorError)
    return next((place for place, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds))


def _told(scene: Scene, seen: BaseException, text: str, logged: str) -> tuple[str, str]:
    """What happened, and what may help."""
    less = " or ".join(f"{scene.section}.{field}" for field in _LESS_MEMORY.get(scene.section, ()))
    freed = "end other programs" + (f", or lower {less} in the resources file" if less else "")
    if isinstance(seen, OutOfMemoryError) or RAY_SAYS_LOW in text:
        return f"Ray ended {_engine(scene)} because memory ran low{_usage(text)}", freed
    if any(words in f"{text}\n{last_words(logged)}" for words in OUT_OF_MEMORY):
        return f"memory ran out: {last_words(text) or last_words(logged)}", freed
    if isinstance(seen, NodeDiedError):
        return f"a node of the cluster was lost: {last_words(text)}", "check that node"
    died = isinstance(seen, WorkerCrashedError) or (isinstance(seen, RayActorError) and not seen.actor_init_failed)
    if not died and (ended := killed(text)):  # an engine's own process, of which the worker tells
        return f"{_engine(scene)} was {ended[0]}{_last(logged)}", ended[1]
    if not died:
        words = last_words(text) or "no reason was given"
        named = re.match(r"[\w.]*(Error|Exception)\b", words)
        return (words if named else f"{type(seen).__name__}: {words}"), ""
    # SIGKILL leaves no trace: the system sends it where memory runs out.
    found = signal_in(f"{text}\n{logged}") or signal.SIGKILL
    message, hint = signal_words(found)
    return f"{_engine(scene)} was {message}{_last(logged)}", freed if found is signal.SIGKILL else hint


def _engine(scene: Scene) -> str:
    """What the workers of a stage are."""
    return "the process of its engine" if scene.section in ("generate", "evaluate") else "one of its worker processes"


def _last(logged: str) -> str:
    words = last_words(logged)
    return f"; its last line: {words}" if words else "; it wrote nothing before"


def _usage(text: str) -> str:
    found = re.search(r"([\d.]+ ?GB) ?/ ?([\d.]+ ?GB)", text)
    return f" ({found[1]} of {found[2]} in use)" if found else ""


def _named(scene: Scene) -> str:
    return f" (log: {short(scene.log)})" if scene.log else ""


def _kept_logs(scene: Scene, text: str) -> str:
    """The end of the log of the worker that failed, else of the latest ones; it is copied to the run's log."""
    pid = re.search(r"\bpid[:=] ?(\d+)", text)
    those = [worker for worker in scene.workers if pid and worker.pid == int(pid[1])] or list(scene.workers)[-4:]
    told = []
    for worker in those:
        here = worker.host == socket.gethostname()
        lines = tail(Path(worker.path)).splitlines()[-_QUOTED_LINES:] if here and worker.path else []
        told.append((f"=== worker {worker.pid} of {scene.step} on {worker.host}: {worker.path or 'no log'}", lines))
    if scene.log is not None and told:
        scene.log.parent.mkdir(parents=True, exist_ok=True)
        with scene.log.open("a", encoding="utf-8") as log:
            log.writelines(f"{line}\n" for head, lines in told for line in (head, *lines))
            log.write(f"=== {scene.step} failed with\n{text}\n")
    return "\n".join(line for _, lines in told for line in lines)
