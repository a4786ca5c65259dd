"""Who may ask, and how much: API keys kept as hashes, read anew when their file changes.

A key is `sk-` and 43 random characters, shown once when it is made; only its SHA-256 is stored. Keys have 256 random
bits, so a slow hash would protect nothing more. Every comparison takes constant time, and every stored key is compared
whatever the first ones say, so that a missing, a wrong and an expired key take equally long to refuse.
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

LOOK_AGAIN_S = 1.0
"""How old an answer about the key file may be."""


class Key(StrictPart):
    """One client. Limits are per minute and per replica of the service; None sets none."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Its name in logs and metrics."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    expires: Annotated[AwareDatetime, Field(strict=False)] | None = None
    models: tuple[str, ...] | None = None
    """The models it may ask; None: all."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers together."""

    def may_ask(self, model: str) -> bool:
        return self.models is None or model in self.models


class KeyFile(StrictPart):
    """What a key file holds."""

    keys: tuple[Key, ...] = ()


ANONYMOUS = Key(id="anonymous", sha256="0" * 64)
"""Whoever asks without a key, where that is allowed."""


def hash_of(secret: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_secret() -> str:
    """A fresh key of 256 random bits."""
    return "sk-" + secrets.token_urlsafe(32)


def parse_keys(text: str, told: str) -> tuple[Key, ...]:
    """Keys of a YAML text `keys: [{id, sha256, ...}]`. Raises `ServeError` that names `told`, never a hash."""
    try:
        parsed: Any = as_frozen(parse_yaml(text))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # PyYAML lets more than its own errors through
        raise ServeError(f"{told} is not YAML", "write it with `sdft keys new`") from None
    try:
        keys = KeyFile.model_validate(parsed).keys
    except ValidationError as error:
        raise ServeError(*describe_validation_error(error, KeyFile, told)) from None
    ids = [key.id for key in keys]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ServeError(f"{told} has two keys named {twice}", "give every key a name of its own")
    return keys


def keys_in_environment(value: str, told: str) -> tuple[Key, ...]:
    """Keys of `ID:SHA256[,ID:SHA256...]`. Raises `ServeError` that does not repeat the value."""
    pairs = [pair.strip().partition(":") for pair in value.split(",") if pair.strip()]
    try:
        return tuple(Key(id=name, sha256=digest) for name, _, digest in pairs)
    except ValidationError:
        raise ServeError(
            f"{told} is not a list of ID:SHA256 parted by commas", "make such a pair with `sdft keys new --print`"
        ) from None


class KeyRing:
    """The keys of a file and of an environment variable, as they are now.

    The file is looked at again once a second. While it is gone nobody is let in by it; while it cannot be understood
    the keys read last stay, so that a slip of the pen locks nobody out, and the log says so.
    """

    def __init__(
        self,
        path: Path | None,
        fixed: Iterable[Key] = (),
        *,
        allow_anonymous: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ServeError` when the file cannot be read or understood to begin with."""
        self._path = path
        self._fixed = tuple(fixed)
        self._allow_anonymous = allow_anonymous
        self._clock = clock
        self._looked_at = clock()
        self._stamp: tuple[int, int] | None = None
        self._filed: tuple[Key, ...] = ()
        if path is not None:
            self._stamp = _stamp_of(path)
            self._filed = read_keys(path)

    @property
    def keys(self) -> tuple[Key, ...]:
        self._look_again()
        return (*self._fixed, *self._filed)

    def identify(self, secret: str | None) -> Key | None:
        """Whose key this is; None for a wrong or expired one, and for none where anonymous clients are not let in.

        Where there are no keys at all, any is as good as none.
        """
        digest = hash_of(secret or "")
        found: Key | None = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        nobody_has_one = self._path is None and not self._fixed  # then clients that must send a key may send any
        if secret is None or nobody_has_one:
            return ANONYMOUS if self._allow_anonymous else None
        return found if found is not None and not _is_over(found) else None

    def _look_again(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            log.error("the key file %s is gone: its keys are refused", self._path)
            self._filed = ()
            return
        try:
            self._filed = parse_keys(_text(self._path), str(self._path))
            log.info("read %d keys from %s", len(self._filed), self._path)
        except ServeError as reason:
            log.error("%s: the keys read before stay in force", reason)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Keys of a file. Raises `ServeError`."""
    if not path.exists():
        raise ServeError(f"there is no key file {path}", "make one with `sdft keys new NAME`")
    return parse_keys(_text(path), str(path))


def make_key(secret: str, **fields: Any) -> Key:
    """A key of that secret. Raises `ServeError` for a name that cannot be one."""
    try:
        return Key(sha256=hash_of(secret), **fields)
    except ValidationError as error:
        raise ServeError(*describe_validation_error(error, Key, "the key")) from None


def add_key(path: Path, key: Key) -> None:
    """Write a file with one key more. Raises `ServeError` for a name that is taken."""
    present = read_keys(path) if path.exists() else ()
    if key.id in {each.id for each in present}:
        raise ServeError(f"{path} has a key named {key.id} already", "revoke it first, or take another name")
    _write(path, (*present, key))


def remove_key(path: Path, name: str) -> None:
    """Write a file without the key of that name. Raises `ServeError` when there is none."""
    present = read_keys(path)
    if name not in {key.id for key in present}:
        known = ", ".join(key.id for key in present) or "none"
        raise ServeError(f"{path} has no key named {name}", f"it has {known}")
    _write(path, tuple(key for key in present if key.id != name))


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Whole or not at all, readable by its owner alone."""
    plain = [key.model_dump(mode="json", exclude_none=True) for key in keys]
    write_file(path, dump_yaml({"keys": plain}), mode=0o600)


def key_ring(access: Access) -> KeyRing:
    """The keys that settings name. Raises `ServeError`."""
    path, variable = Path(access.keys_file) if access.keys_file else None, access.keys_variable
    fixed = keys_in_environment(os.environ.get(variable, ""), f"${variable}")
    return KeyRing(path, fixed, allow_anonymous=access.allow_anonymous)


def check_closed(access: Access) -> None:
    """Raise `ServeError` for a service that others can reach and that names neither keys nor leave to do without.

    Whether the keys are there is for replicas to see, which refuse everyone while they are not.
    """
    if access.keys_file is None and not os.environ.get(access.keys_variable) and not access.allow_anonymous:
        raise ServeError(
            "the service would be open, or closed to everyone: it names no keys",
            f"set access.keys_file or ${access.keys_variable}, or access.allow_anonymous: true",
        )


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ServeError(f"cannot read the key file {path}", "check its permissions") from None


def _is_over(key: Key) -> bool:
    return key.expires is not None and key.expires <= datetime.now(UTC)
