"""A model repository on the Hugging Face hub as a destination: one commit per release, private by default.

Token and endpoint are those of huggingface_hub: `HF_TOKEN` or `hf auth login`, and `HF_ENDPOINT`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.errors import StoreError, UserError
from sdft_ray.release.files import ReleaseFile, Watch, is_visible

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

SCHEME = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TIMEOUT_S = 30


class Repository:
    """`hf://OWNER/NAME`, on the branch `revision` if given. It is created when the first file is sent.

    The visibility of an existing repository is not changed; it must be the requested one.
    """

    def __init__(self, url: str, *, private: bool, revision: str | None) -> None:
        from huggingface_hub import HfApi, get_token

        self.repository = url.removeprefix(SCHEME).rstrip("/")
        if not _REPOSITORY.fullmatch(self.repository):
            raise StoreError(f"{url} is not a model repository", "give hf://OWNER/NAME")
        self._token = get_token()
        if self._token is None:
            raise StoreError(
                "no token for the Hugging Face Hub is configured",
                "set HF_TOKEN to a token with write access, or run `hf auth login`",
            )
        self._api: HfApi = HfApi(token=self._token)
        self._private, self._revision = private, revision
        self._exists = self._has_branch = False
        self._commit: str | None = None
        self._files: dict[str, RepoSibling] = {}
        self._look()

    @property
    def url(self) -> str:
        branch = f"/tree/{self._revision}" if self._revision else ""
        return f"{self._api.endpoint}/{self.repository}{branch}"

    def names(self) -> list[str]:
        return sorted(name for name in self._files if is_visible(name))

    def holds(self, piece: ReleaseFile) -> bool:
        """Compares digests: the hub has the SHA-256 of LFS files and git's digest of the others."""
        there = self._files.get(piece.name)
        if there is None or there.size not in (None, piece.num_bytes):
            return False
        return there.lfs.sha256 == piece.sha256 if there.lfs else there.blob_id == _git_digest(piece)

    def read(self, name: str) -> bytes:
        with self._failing(), tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.repository, name, revision=self._commit, local_dir=folder)
            return Path(path).read_bytes()

    def send(self, pieces: Sequence[ReleaseFile], watch: Watch) -> None:
        """Send everything in one commit, so that no incomplete release is visible; then compare the digests."""
        from huggingface_hub import CommitOperationAdd

        operations = [
            CommitOperationAdd(piece.name, piece.content if isinstance(piece.content, bytes) else str(piece.content))
            for piece in pieces
        ]
        with self._failing():
            if not self._exists:
                self._api.create_repo(self.repository, private=self._private)
            if self._revision and not self._has_branch:
                self._api.create_branch(self.repository, branch=self._revision, exist_ok=True)
            self._api.create_commit(
                self.repository,
                operations,
                commit_message="Upload by sdft push",
                revision=self._revision,
                parent_commit=self._commit if self._has_branch else None,
            )
        self._look()
        for piece in pieces:
            if not self.holds(piece):
                raise StoreError(f"{piece.name} differs from what was sent to {self.url}", "push again")
            watch(piece.name, piece.num_bytes)

    def _look(self) -> None:
        """Read the current content. A new branch is a copy of main, so main must be empty to create one."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._failing():
            try:
                info = self._info(self._revision)
                self._has_branch = True
            except RevisionNotFoundError:
                info = self._info(None)
            except RepositoryNotFoundError:
                return
        self._exists, self._commit = True, info.sha
        self._files = {file.rfilename: file for file in info.siblings or ()}
        self._check_visibility(bool(info.private))
        if not self._has_branch and self.names():
            message = (
                f"{self.repository} has no branch {self._revision}, and a new one would start with the files of main"
            )
            raise StoreError(message, "create an empty branch on the hub first, or choose another repository")

    def _info(self, revision: str | None) -> Any:
        return self._api.repo_info(self.repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)

    def _check_visibility(self, is_private: bool) -> None:
        if self._private and not is_private:
            raise StoreError(f"{self.repository} exists and is public", "give --public, or choose another repository")
        if is_private and not self._private:
            hint = "leave out --public, or change its visibility on its settings page first"
            raise StoreError(f"{self.repository} exists and is private", hint)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn any error of the hub, the network or the upload into one line with a next step."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        try:
            yield
        except UserError:
            raise
        except OfflineModeIsEnabled:
            raise StoreError(
                "HF_HUB_OFFLINE disables access to the Hugging Face Hub", "unset it, then push again"
            ) from None
        except (HTTPError, OSError, RuntimeError, ValueError) as reason:
            cause = reason.__cause__ if isinstance(reason, RuntimeError) and reason.__cause__ else reason
            if isinstance(cause, HfHubHTTPError):
                raise self._refused(cause) from None
            message = f"{self._api.endpoint} failed: {self._line(str(cause)) or type(cause).__name__}"
            raise StoreError(message, "check the network and HF_ENDPOINT, then push again") from None

    def _refused(self, error: Any) -> StoreError:
        status = error.response.status_code
        reason = self._line(error.server_message or str(error))
        if status == 401:
            return StoreError(f"the hub rejects the token: {reason}", "set HF_TOKEN to a valid one")
        if status in (403, 404):
            owner = self.repository.partition("/")[0]
            hint = f"use a token with write access, or your own account instead of {owner}"
            return StoreError(f"you have no write access to {self.repository}: {reason}", hint)
        if status in (409, 412):
            return StoreError(f"{self.repository} was changed in the meantime: {reason}", "push again")
        return StoreError(f"the hub returned {status}: {reason}", "push again later")

    def _line(self, text: str) -> str:
        """The first line that is not empty, with the token removed."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (lines or [""])[0].replace(self._token or "\0", "(token)")


def _git_digest(piece: ReleaseFile) -> str:
    """The digest that git gives to a file's content."""
    digest = hashlib.sha1(f"blob {piece.num_bytes}\0".encode(), usedforsecurity=False)
    for chunk in piece.chunks():
        digest.update(chunk)
    return digest.hexdigest()
