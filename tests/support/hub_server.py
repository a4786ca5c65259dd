"""A model hub on loopback: the few requests with which huggingface_hub makes a repository, fills and reads it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ofAliceWhoMayWrite"
LARGE_BYTES = 10_000
"""Files from here on go to the store for large ones, as on the hub those of 10 MB do."""


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"*.bin lfs\n"}})
    num_commits: int = 1
    metadata: dict[str, Any] = field(default_factory=dict)

    def sha(self, branch: str) -> str:
        return hashlib.sha1(f"{branch}{self.num_commits}".encode()).hexdigest()


class Hub:
    """What is stored, and which requests came. `faults` maps a part of a path to the status it is answered with."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, int] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(f"{method} {path}")
        for part, status in self.faults.items():
            if part in path:
                return status, {"X-Error-Message": "the hub is out of order"}, b"{}"
        for pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return handle(self, body, token, *(unquote(group) for group in found.groups()))
        return 404, {}, b"{}"

    def create(self, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if token != TOKEN:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        if asked["organization"] != "alice":
            return 403, {"X-Error-Message": f"You have no rights there with {token}"}, b"{}"
        if name in self.repos:
            return 409, {"X-Error-Message": "You already created this repo"}, b"{}"
        self.repos[name] = Repo(asked["visibility"] == "private")
        return _json({"url": f"{self.url}/{name}"})

    def info(self, body: bytes, token: str, name: str, branch: str = "main") -> tuple[int, dict[str, str], bytes]:
        repo = self.repos.get(name)
        if repo is None or (repo.private and token != TOKEN):
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        if branch not in repo.branches:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        files = [_sibling(name, content) for name, content in repo.branches[branch].items()]
        told = {"id": name, "private": repo.private, "sha": repo.sha(branch), "siblings": files, "tags": []}
        return _json({**told, "cardData": repo.metadata} if repo.metadata else told)

    def branch(self, body: bytes, token: str, name: str, branch: str) -> tuple[int, dict[str, str], bytes]:
        self.repos[name].branches[branch] = dict(self.repos[name].branches["main"])
        return _json({})

    def validate(self, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        return _json({"warnings": [], "errors": []})

    def preupload(self, body: bytes, token: str, name: str, branch: str) -> tuple[int, dict[str, str], bytes]:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE_BYTES else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return _json({"files": modes})

    def batch(self, body: bytes, token: str, name: str) -> tuple[int, dict[str, str], bytes]:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, token: str, oid: str) -> tuple[int, dict[str, str], bytes]:
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return _json({})

    def commit(self, body: bytes, token: str, name: str, branch: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.repos[name]
        header, *files = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit", repo.sha(branch)) != repo.sha(branch):
            return 412, {"X-Error-Message": "A commit has happened since"}, b"{}"
        for file in files:
            value, large = file["value"], file["key"] == "lfsFile"
            content = self.large[value["oid"]] if large else base64.b64decode(value["content"])
            repo.branches[branch][value["path"]] = content
        repo.num_commits += 1
        return _json({"commitUrl": f"{self.url}/{name}/commit/{repo.sha(branch)}", "commitOid": repo.sha(branch)})

    def resolve(self, body: bytes, token: str, name: str, sha: str, file: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.repos[name]
        content = next(files for branch, files in repo.branches.items() if sha in (branch, repo.sha(branch)))[file]
        return 200, {"ETag": f'"{_git_digest(content)}"', "X-Repo-Commit": sha}, content


_REPO = r"([^/]+/[^/]+?)"
_ROUTES = [
    (r"POST /api/repos/create", Hub.create),
    (rf"GET /api/models/{_REPO}", Hub.info),
    (rf"GET /api/models/{_REPO}/revision/([^/]+)", Hub.info),
    (rf"POST /api/models/{_REPO}/branch/([^/]+)", Hub.branch),
    (r"POST /api/validate-yaml", Hub.validate),
    (rf"POST /api/models/{_REPO}/preupload/([^/]+)", Hub.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Hub.batch),
    (r"PUT /large/(\w+)", Hub.upload),
    (rf"POST /api/models/{_REPO}/commit/([^/]+)", Hub.commit),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", Hub.resolve),
]


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    is_large = len(content) >= LARGE_BYTES
    told = {"rfilename": name, "size": len(content), "blobId": "0" * 40 if is_large else _git_digest(content)}
    return {**told, "lfs": large} if is_large else told


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that listens until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else the body waits 40 ms for the client to acknowledge the headers

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, headers, content = hub.answer(self.command, urlsplit(self.path).path, body, token)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
