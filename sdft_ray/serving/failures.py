"""Why a service does not start, from what Ray Serve raised and from what its replicas wrote."""

from __future__ import annotations

from pathlib import Path

from sdft_ray.errors import ServeError
from sdft_ray.generation.engine_errors import cache_error
from sdft_ray.progress.killed import killed
from sdft_ray.progress.logs import last_words, tail

_MAX_LOGS = 8


def start_error(text: str, session: Path | None, since: float, log: Path) -> ServeError:
    """The sentence for `text`, the message of Ray Serve's exception.

    `session` is the folder of Ray's session, if it is on this machine; files that changed after `since` (seconds of the
    epoch) count. `log` holds what libraries wrote in this process.
    """
    logs = _replica_logs(session, since) if session else []
    tails = {path: tail(path) for path in logs}
    everything = "\n".join([*tails.values(), text])
    told = last_words(everything)
    where = next((path for path in logs if told and told in tails[path]), logs[0] if logs else log)
    if room := cache_error(everything, "engine"):
        return ServeError(f"the service does not start: {room[0]} (log: {where})", f"{room[1]}, in the settings file")
    if ended := killed(everything, where):
        return ServeError(f"the service does not start: its engine was {ended[0]}", ended[1])
    return ServeError(f"the service does not start: {told or 'no reason was given'}", f"read the log: {where}")


def _replica_logs(session: Path, since: float) -> list[Path]:
    """Logs of replicas and of the workers that hold them, the latest first."""
    logs = session / "logs"
    found = [*logs.glob("serve/replica_*.log"), *logs.glob("worker-*.err")]
    recent = [(path.stat().st_mtime, path) for path in found if path.stat().st_size]
    return [path for changed, path in sorted(recent, reverse=True) if changed >= since][:_MAX_LOGS]
