"""API-key authentication and per-key limits. Keys are stored as hashes; their file is reloaded when it changes.

A key is `sk-` and 43 random characters. It is printed once, when it is created; only its SHA-256 is stored. Keys have
256 random bits, so a slow hash would not protect them better. Comparisons take constant time, and a given key is
compared with every stored key, so a missing, a wrong and an expired key take equally long to reject.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AwareDatetime, Field, ValidationError

from sdft_ray.errors import ServeError
from sdft_ray.recipe.yaml_model import StrictPart, as_frozen, describe_validation_error, dump_yaml, parse_yaml
from sdft_ray.serving.settings import Access
from sdft_ray.store.atomic import write_file

log = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0
"""Seconds between two checks whether the key file has changed."""


class Key(StrictPart):
    """The key of one client. Limits are per minute and per replica; None means no limit."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Its name in logs and metrics."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    expires: Annotated[AwareDatetime, Field(strict=False)] | None = None
    models: tuple[str, ...] | None = None
    """Models that it may use; None: all."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers together."""

    def may_ask(self, model: str) -> bool:
        return self.models is None or model in self.models


class KeyFile(StrictPart):
    """The content of a key file."""

    keys: tuple[Key, ...] = ()


ANONYMOUS = Key(id="anonymous", sha256="0" * 64)
"""The client of a request without a key, where that is allowed."""


def hash_of(secret: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_secret() -> str:
    """A new key with 256 random bits."""
    return "sk-" + secrets.token_urlsafe(32)


def parse_keys(text: str, origin: str) -> tuple[Key, ...]:
    """Keys of a YAML text `keys: [{id, sha256, ...}]`. Raises `ServeError` that names `origin`, never a hash."""
    try:
        parsed: Any = as_frozen(parse_yaml(text))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # PyYAML raises more than its own errors
        raise ServeError(f"{origin} is not YAML", "create it with `sdft keys new`") from None
    try:
        keys = KeyFile.model_validate(parsed).keys
    except ValidationError as error:
        raise ServeError(*describe_validation_error(error, KeyFile, origin)) from None
    ids = [key.id for key in keys]
    if len(set(ids)) < len(ids):
        duplicate = next(name for name in ids if ids.count(name) > 1)
        raise ServeError(f"{origin} has two keys named {duplicate}", "give every key a different name")
    return keys


def keys_in_environment(value: str, origin: str) -> tuple[Key, ...]:
    """Keys of `ID:SHA256[,ID:SHA256...]`. Raises `ServeError` that does not repeat the value."""
    pairs = [pair.strip().partition(":") for pair in value.split(",") if pair.strip()]
    try:
        return tuple(Key(id=name, sha256=digest) for name, _, digest in pairs)
    except ValidationError:
        raise ServeError(
            f"{origin} is not a comma-separated list of ID:SHA256", "create such pairs with `sdft keys new --print`"
        ) from None


class KeyRing:
    """The current keys of a file and of an environment variable.

    The file is checked for changes once a second. If it is missing, its keys are rejected. If it is invalid, the keys
    read last stay valid, so that a typo in the file locks nobody out; the log reports it.
    """

    def __init__(
        self,
        path: Path | None,
        fixed: Iterable[Key] = (),
        *,
        allow_anonymous: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ServeError` if the file cannot be read or is invalid at the start."""
        self._path = path
        self._fixed = tuple(fixed)
        self._allow_anonymous = allow_anonymous
        self._clock = clock
        self._checked_at = clock()
        self._stamp: tuple[int, int] | None = None
        self._file_keys: tuple[Key, ...] = ()
        if path is not None:
            self._stamp = _stamp_of(path)
            self._file_keys = read_keys(path)

    @property
    def keys(self) -> tuple[Key, ...]:
        self._reload()
        return (*self._fixed, *self._file_keys)

    def identify(self, secret: str | None) -> Key | None:
        """The key with this secret. None if it is wrong or expired, or if it is missing and anonymity is not allowed.

        Where no keys are configured, any secret is accepted as anonymous.
        """
        digest = hash_of(secret or "")
        match: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                match = key
        no_keys = self._path is None and not self._fixed  # some clients cannot leave the key out, so any is accepted
        if secret is None or no_keys:
            return ANONYMOUS if self._allow_anonymous else None
        return match if match is not None and not _has_expired(match) else None

    def _reload(self) -> None:
        now = self._clock()
        if self._path is None or now - self._checked_at < RELOAD_INTERVAL_S:
            return
        self._checked_at = now
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            log.error("the key file %s is missing: its keys are rejected", self._path)
            self._file_keys = ()
            return
        try:
            self._file_keys = parse_keys(_text(self._path), str(self._path))
            log.info("read %d keys from %s", len(self._file_keys), self._path)
        except ServeError as reason:
            log.error("%s; the keys that were read before remain valid", reason)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Keys of a file. Raises `ServeError`."""
    if not path.exists():
        raise ServeError(f"there is no key file {path}", "create it with `sdft keys new NAME`")
    return parse_keys(_text(path), str(path))


def make_key(secret: str, **fields: Any) -> Key:
    """A key with that secret. Raises `ServeError` for an invalid name."""
    try:
        return Key(sha256=hash_of(secret), **fields)
    except ValidationError as error:
        raise ServeError(*describe_validation_error(error, Key, "the key")) from None


def add_key(path: Path, key: Key) -> None:
    """Add a key to a file, which may be missing. Raises `ServeError` for a name that is in use."""
    present = read_keys(path) if path.exists() else ()
    if key.id in {each.id for each in present}:
        raise ServeError(f"{path} already has a key named {key.id}", "revoke it first, or choose another name")
    _write(path, (*present, key))


def remove_key(path: Path, name: str) -> None:
    """Remove the key with that name from a file. Raises `ServeError` if there is none."""
    present = read_keys(path)
    if name not in {key.id for key in present}:
        known = ", ".join(key.id for key in present) or "none"
        raise ServeError(f"{path} has no key named {name}", f"it has {known}")
    _write(path, tuple(key for key in present if key.id != name))


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Write atomically, readable by the owner only."""
    plain = [key.model_dump(mode="json", exclude_none=True) for key in keys]
    write_file(path, dump_yaml({"keys": plain}), mode=0o600)


def key_ring(access: Access) -> KeyRing:
    """The keys that the settings configure. Raises `ServeError`."""
    path, variable = Path(access.keys_file) if access.keys_file else None, access.keys_variable
    fixed = keys_in_environment(os.environ.get(variable, ""), f"${variable}")
    return KeyRing(path, fixed, allow_anonymous=access.allow_anonymous)


def check_access(access: Access) -> None:
    """Raises `ServeError` for settings with neither keys nor `allow_anonymous`.

    Replicas check whether the configured keys exist; while there are none, they reject every request.
    """
    if access.keys_file is None and not os.environ.get(access.keys_variable) and not access.allow_anonymous:
        raise ServeError(
            "no API keys are configured, and anonymous access is not allowed",
            f"set access.keys_file or ${access.keys_variable}, or access.allow_anonymous: true",
        )


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ServeError(f"cannot read the key file {path}", "check its permissions") from None


def _has_expired(key: Key) -> bool:
    return key.expires is not None and key.expires <= datetime.now(UTC)
