"""What a service goes through: slow clients, a killed replica, an update, no load at all, and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from sdft_ray.lab.export import TEACHER
from sdft_ray.serving.access import add_key, make_key, new_secret
from sdft_ray.serving.haproxy import free_ports
from sdft_ray.serving.haproxy_config import HEADER_TIMEOUT_S
from tests.serve.service import Crowd, Running, serving

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.service]

BODY: dict[str, Any] = {"model": "teacher", "prompt": "A farmer has 12 hens", "max_tokens": 60, "temperature": 2.0}
# This engine comes up faster than vLLM; what is tested here is around it.
MODEL = {"name": "teacher", "source": str(TEACHER), "engine": {"kind": "transformers"}}


def write_settings(folder: Path, **fields: Any) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"models": [MODEL], **fields}), encoding="utf-8")
    return path


class TestTwoReplicas:
    """Behind TLS and keys."""

    @pytest.fixture(scope="class")
    def home(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("lifecycle")

    @pytest.fixture(scope="class")
    def trusted(self, home: Path) -> ssl.SSLContext:
        names = ["-keyout", str(home / "tls.key"), "-out", str(home / "tls.crt"), "-days", "2", "-nodes"]
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        subprocess.run(["openssl", "req", "-x509", *kind, *names, *subject], check=True, capture_output=True)
        return ssl.create_default_context(cafile=str(home / "tls.crt"))

    @pytest.fixture(scope="class")
    def headers(self, home: Path) -> dict[str, str]:
        secret = new_secret()
        add_key(home / "keys.yaml", make_key(secret, id="tests"))
        return {"Authorization": f"Bearer {secret}"}

    @pytest.fixture(scope="class")
    def running(self, home: Path, headers: dict[str, str], trusted: ssl.SSLContext) -> Iterator[Running]:
        replicas = {"min": 2, "max": 2, "cpus": 0.5, "drain_s": 60}
        settings = write_settings(home, replicas=replicas, access={"keys_file": str(home / "keys.yaml")})
        tls = ["--tls-certificate", home / "tls.crt", "--tls-key", home / "tls.key"]
        with serving(home, "--config", settings, *tls, trusted=trusted) as found:
            yield found

    def test_it_speaks_tls_alone(self, running: Running, headers: dict[str, str], trusted: ssl.SSLContext) -> None:
        assert (
            httpx.post(f"{running.url}/v1/completions", json=BODY, headers=headers, verify=trusted).status_code == 200
        )
        assert httpx.post(f"{running.url}/v1/completions", json=BODY, verify=trusted).status_code == 401
        with pytest.raises(httpx.HTTPError):
            httpx.get(running.url.replace("https", "http") + "/healthz")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{running.url}/healthz")

    @pytest.mark.nightly
    def test_clients_who_dawdle_are_sent_away(self, running: Running, trusted: ssl.SSLContext) -> None:
        """Over their headers by HAProxy; a hundred of them are in nobody's way."""
        port = int(running.url.rpartition(":")[2])
        slow = [
            trusted.wrap_socket(socket.create_connection(("localhost", port)), server_hostname="localhost")
            for _ in range(100)
        ]
        began = time.monotonic()
        for each in slow:
            each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert httpx.get(f"{running.url}/readyz", verify=trusted, timeout=5).text == "ready"
        for each in slow:
            each.settimeout(HEADER_TIMEOUT_S + 20)
            assert each.recv(100).startswith(b"HTTP/1.1 408")
            each.close()
        assert time.monotonic() - began >= HEADER_TIMEOUT_S - 1

    def test_a_killed_replica_takes_only_its_own_requests_along(
        self, running: Running, headers: dict[str, str], trusted: ssl.SSLContext
    ) -> None:
        replicas = running.family("ServeReplica:")
        assert len(replicas) == 2
        with Crowd(running.url, BODY, 8, headers, trusted) as crowd:
            crowd.wait_for(16)
            killed = time.monotonic()
            os.kill(replicas[0].pid, signal.SIGKILL)
            crowd.wait_for(16)
            deadline = time.monotonic() + 120
            while len(found := running.family("ServeReplica:")) < 2:
                assert time.monotonic() < deadline, found
                time.sleep(0.2)
            crowd.wait_for(60)
        under_way = [each for each in crowd.asked if each.began < killed <= each.ended]
        assert {each.outcome for each in under_way} == {200, "broken"} or {each.outcome for each in under_way} == {
            200,
            502,
        }
        assert crowd.outcomes(since=killed) == {200}

    def test_its_end_answers_what_is_under_way(
        self, running: Running, headers: dict[str, str], trusted: ssl.SSLContext
    ) -> None:
        with (
            httpx.Client(verify=trusted) as idle,
            Crowd(running.url, {**BODY, "stream": True}, 8, headers, trusted) as crowd,
        ):
            assert idle.get(f"{running.url}/readyz").text == "ready"  # and its connection stays open, as a browser's
            crowd.wait_for(16)
            ended = time.monotonic()
            running.process.send_signal(signal.SIGINT)
            running.process.wait(40)
        assert {each.outcome for each in crowd.asked if each.began < ended} == {200}
        assert crowd.outcomes(since=ended) <= {200, "refused"}
        log = running.log.read_text(encoding="utf-8").partition("finishing the requests in flight")[2]
        assert log == " (Ctrl-C again: at once) ...\n"


@pytest.mark.nightly
class TestACluster:
    """A Ray that runs, on which `serve deploy` puts the service."""

    @pytest.fixture(scope="class")
    def cluster(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        from tests.support.nodes import Cluster

        with pytest.MonkeyPatch.context() as changed:
            changed.setenv("HOME", str(tmp_path_factory.mktemp("home")))
            changed.setenv("RAY_AUTH_MODE", "disabled")
            changed.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
            changed.setenv("RAY_worker_niceness", "0")
            cluster = Cluster()
            try:
                head = cluster.add_node(
                    num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=True,
                    dashboard_host="127.0.0.1", dashboard_port=0,
                )  # fmt: skip
                yield f"http://{head.webui_url}"
            finally:
                cluster.shutdown()

    @pytest.fixture(scope="class")
    def port(self) -> int:
        return free_ports(1)[0]

    def deploy(self, folder: Path, cluster: str, port: int, **fields: Any) -> None:
        """`serve deploy`, as a user does it."""
        config = yaml.safe_load(Path("serve/config.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = port
        args = {"models": [MODEL], "access": {"allow_anonymous": True}, **fields}
        config["applications"][0]["args"] = args
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [Path(sys.executable).with_name("serve"), "deploy", path, "--address", cluster]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self, cluster: str) -> dict[str, Any]:
        return httpx.get(f"{cluster}/api/serve/applications/").json()["applications"]["sdft"]

    def wait_until(self, cluster: str, wanted: str) -> None:
        deadline = time.monotonic() + 240
        while (found := self.status(cluster))["status"] != wanted:
            assert time.monotonic() < deadline, json.dumps(found, indent=1)
            assert found["status"] != "DEPLOY_FAILED", found["message"]
            time.sleep(0.5)

    def num_replicas(self, cluster: str) -> int:
        return len(self.status(cluster)["deployments"]["models"]["replicas"])

    def test_it_comes_up_from_nothing_when_it_is_asked_and_goes_again(
        self, cluster: str, port: int, tmp_path: Path
    ) -> None:
        replicas = {"min": 0, "max": 1, "scale_up_after_s": 0, "scale_down_after_s": 3, "cpus": 0.5}
        self.deploy(tmp_path, cluster, port, replicas=replicas)
        self.wait_until(cluster, "RUNNING")
        assert self.num_replicas(cluster) == 0
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=200)
        assert answer.status_code == 200
        assert self.num_replicas(cluster) == 1
        deadline = time.monotonic() + 90
        while self.num_replicas(cluster):
            assert time.monotonic() < deadline
            time.sleep(0.5)

    @pytest.mark.parametrize("surge", [True, False])
    def test_an_update_fails_no_request(self, cluster: str, port: int, tmp_path: Path, surge: bool) -> None:
        """With surge nobody waits for it either."""
        replicas = {"cpus": 0.5, "surge": surge}
        self.deploy(tmp_path, cluster, port, replicas=replicas)
        self.wait_until(cluster, "RUNNING")
        with Crowd(f"http://127.0.0.1:{port}", {**BODY, "stream": True}, 4) as crowd:
            crowd.wait_for(8)
            (old,) = self.status(cluster)["deployments"]["models"]["replicas"]
            self.deploy(tmp_path, cluster, port, replicas=replicas, limits={"max_running": 100})
            self.wait_until(cluster, "DEPLOYING")
            self.wait_until(cluster, "RUNNING")
            crowd.wait_for(8)
        (new,) = self.status(cluster)["deployments"]["models"]["replicas"]
        assert new["pid"] != old["pid"]
        assert crowd.outcomes() == {200}
        longest = max(each.ended - each.began for each in crowd.asked)
        assert longest < 10 or not surge
