"""The files of a release, and the interface of a destination."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Watch = Callable[[str, int], None]
"""Progress callback: called with the name of a file and the number of its bytes that were sent."""

CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release: its name at the destination, and its content, a local file or bytes."""

    name: str
    num_bytes: int
    sha256: str
    content: Path | bytes

    @classmethod
    def of_text(cls, name: str, text: str) -> ReleaseFile:
        content = text.encode("utf-8", "replace")
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content)

    def chunks(self) -> Iterator[bytes]:
        """Its content in chunks of at most `CHUNK_BYTES`."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


class Destination(Protocol):
    """A place for releases. All methods raise `StoreError` if it cannot be reached, read or written."""

    @property
    def url(self) -> str:
        """Its address, without credentials."""
        ...

    @property
    def repository(self) -> str:
        """OWNER/NAME on the hub; "" elsewhere."""
        ...

    def names(self) -> list[str]:
        """Relative paths of the files that it has, with forward slashes, without hidden files."""
        ...

    def holds(self, piece: ReleaseFile) -> bool:
        """Whether the file with the piece's name has the same content."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        ...

    def send(self, pieces: Sequence[ReleaseFile], watch: Watch) -> None:
        """Write the pieces in this order, replacing files with the same names."""
        ...


def is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))
