"""What is sent, and what every destination can do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Watch = Callable[[str, int], None]
"""Told the name of a file and how many of its bytes are sent, again and again."""

CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Piece:
    """One file of a release, under its name there, from a file here or from memory."""

    name: str
    num_bytes: int
    sha256: str
    content: Path | bytes

    @classmethod
    def of_text(cls, name: str, text: str) -> Piece:
        content = text.encode("utf-8", "replace")
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes in order, at most `CHUNK_BYTES` at a time."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


class Destination(Protocol):
    """All raise `StoreError` where the destination cannot be reached, read or written."""

    @property
    def url(self) -> str:
        """The address to show and to load from, without credentials."""
        ...

    @property
    def repository(self) -> str:
        """OWNER/NAME on the hub, "" elsewhere."""
        ...

    def names(self) -> list[str]:
        """Files that are there, relative, with forward slashes; hidden ones do not count."""
        ...

    def holds(self, piece: Piece) -> bool:
        """Whether the very bytes of a piece lie under its name."""
        ...

    def read(self, name: str) -> bytes:
        """A small file that is there."""
        ...

    def send(self, pieces: Sequence[Piece], watch: Watch) -> None:
        """Write them in this order, replacing what has their names."""
        ...


def is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))
