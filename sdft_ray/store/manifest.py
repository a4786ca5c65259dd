"""The manifest: the commit of one artifact, and everything one may later ask about it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Usage:
    """What making an artifact took. `peak_rss_bytes` adds up the workers that ran at the same time."""

    wall_s: float = 0.0
    device_s: float = 0.0
    peak_rss_bytes: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class Manifest:
    """Written last into `ROOT/<stage>/<16 hex>/manifest.json`; where it is absent there is no artifact.

    `identity` is the very canonical JSON whose sha256 is `fingerprint`. `inputs` maps roles to addresses.
    `summary` holds small facts (row counts, a plan) that other steps and `sdft show` read without the files.
    `folder` is where the files lie below the address: "" in a local store, which holds them beside the manifest.
    """

    step: str
    stage: str
    address: str
    fingerprint: str
    identity: str
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    usage: Usage
    summary: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str = ""
    created: str = ""
    folder: str = ""

    @property
    def place(self) -> str:
        """Where the files lie, relative to the store's root."""
        return f"{self.address}/{self.folder}" if self.folder else self.address

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises `ValueError` when the text is no manifest."""
        data = json.loads(text)
        if not isinstance(data, dict) or "address" not in data:
            raise ValueError("not a manifest")
        files = {name: FileEntry(**entry) for name, entry in data.pop("files").items()}
        usage = Usage(**data.pop("usage"))
        return cls(files=files, usage=usage, **data)
