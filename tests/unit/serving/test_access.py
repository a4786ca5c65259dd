"""Keys: who is let in, what changes while the service runs, and that no key or hash is ever told."""

from __future__ import annotations

import contextlib
import hmac
import logging
import re
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdft_ray.cli import app as cli
from sdft_ray.errors import ServeError
from sdft_ray.serving.access import (
    ANONYMOUS,
    RELOAD_INTERVAL_S,
    Key,
    KeyRing,
    add_key,
    hash_of,
    key_ring,
    keys_in_environment,
    make_key,
    new_secret,
    parse_keys,
    read_keys,
    remove_key,
)
from sdft_ray.serving.settings import Access

PATIENT = settings(deadline=None, max_examples=60)


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made(name: str, **more: object) -> tuple[str, Key]:
    secret = new_secret()
    return secret, Key(id=name, sha256=hash_of(secret), **more)  # type: ignore[arg-type]


def ring(*keys: Key, allow_anonymous: bool = False) -> KeyRing:
    return KeyRing(None, keys, allow_anonymous=allow_anonymous)


@pytest.fixture
def filed(tmp_path: Path) -> tuple[Path, str]:
    """A key file with the key `first`, and that key."""
    secret, key = made("first")
    add_key(tmp_path / "keys.yaml", key)
    return tmp_path / "keys.yaml", secret


def test_a_key_is_let_in_and_anything_else_is_not() -> None:
    secret, key = made("one")
    keys = ring(key)
    assert keys.identify(secret) == key
    for wrong in (None, "", "sk-", secret[:-1], secret + "x", secret.upper(), key.sha256, "sk-\xff\u20ac", "\udc80"):
        assert keys.identify(wrong) is None, wrong


def test_new_keys_are_long_and_never_alike() -> None:
    secrets = {new_secret() for _ in range(200)}
    assert len(secrets) == 200
    assert all(re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", secret) for secret in secrets)


def test_an_expired_key_is_refused() -> None:
    now = datetime.now(UTC)
    over, dead = made("over", expires=now - timedelta(seconds=1))
    valid, alive = made("valid", expires=now + timedelta(hours=1))
    assert ring(dead, alive).identify(over) is None
    assert ring(dead, alive).identify(valid) == alive


def test_without_a_key_one_is_let_in_only_where_that_is_allowed_and_a_wrong_key_never() -> None:
    secret, key = made("one")
    open_to_all = ring(key, allow_anonymous=True)
    assert open_to_all.identify(None) is ANONYMOUS
    assert open_to_all.identify(secret) == key
    assert open_to_all.identify("sk-wrong") is None
    assert open_to_all.identify("") is None


@pytest.mark.parametrize("position", [0, 3, 6, None])
def test_every_stored_key_is_compared_wherever_the_right_one_stands(
    position: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [made(f"key{i}", expires=datetime.now(UTC) - timedelta(days=i % 2)) for i in range(7)]
    keys, compared = ring(*(key for _, key in pairs)), []
    real = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys.identify(None if position is None else pairs[position][0])
    assert compared == [key.sha256 for _, key in pairs]


def test_a_key_names_the_models_it_may_ask() -> None:
    _, every = made("all")
    _, some = made("some", models=("student",))
    assert every.may_ask("anything")
    assert some.may_ask("student")
    assert not some.may_ask("teacher")


def test_a_changed_file_is_heeded_without_a_restart(filed: tuple[Path, str]) -> None:
    path, first = filed
    clock = Clock()
    keys = KeyRing(path, allow_anonymous=False, clock=clock)
    secret, key = made("second")
    add_key(path, key)
    assert keys.identify(secret) is None, "not looked at again yet"
    clock.now += RELOAD_INTERVAL_S
    assert keys.identify(secret) == key
    assert keys.identify(first) is not None
    remove_key(path, "first")
    clock.now += RELOAD_INTERVAL_S
    assert keys.identify(first) is None
    assert keys.identify(secret) == key


def test_while_the_file_is_gone_its_keys_are_refused(filed: tuple[Path, str], caplog: pytest.LogCaptureFixture) -> None:
    path, first = filed
    clock = Clock()
    fixed, key = made("fixed")
    keys = KeyRing(path, (key,), allow_anonymous=False, clock=clock)
    text = path.read_text(encoding="utf-8")
    path.unlink()
    clock.now += RELOAD_INTERVAL_S
    assert keys.identify(first) is None
    assert keys.identify(fixed) == key, "it does not come from the file"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    path.write_text(text, encoding="utf-8")
    clock.now += RELOAD_INTERVAL_S
    assert keys.identify(first) is not None


SECRET_TEXT = "sk-" + "S" * 43
BROKEN = {
    "not YAML": f"keys: [{SECRET_TEXT}",
    "a key in place of its hash": f"keys:\n- {{id: a, sha256: {SECRET_TEXT}}}",
    "a list": f"- {SECRET_TEXT}",
    "unknown field": f"keys:\n- {{id: a, sha256: {'0' * 64}, secret: {SECRET_TEXT}}}",
    "a name that is none": f"keys:\n- {{id: 'a {SECRET_TEXT}', sha256: {'a' * 64}}}",
    "a day that is none": f"keys:\n- {{id: a, sha256: {'a' * 64}, expires: 2026-13-45T00:00:00Z}} # {SECRET_TEXT}",
    "a date without zone": f"keys:\n- {{id: a, sha256: {'a' * 64}, expires: 2026-01-01T00:00:00}}",
    "a mapping as a key": f"? {{[a]: {SECRET_TEXT}}}\n: 1",
    "a text that holds itself": "keys: &a [*a]",
    "deep": "[" * 600,
    "two of a name": f"keys:\n- {{id: a, sha256: {'a' * 64}}}\n- {{id: a, sha256: {'b' * 64}}}",
    "limit of zero": f"keys:\n- {{id: a, sha256: {'a' * 64}, requests_per_minute: 0}}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_while_the_file_is_broken_the_keys_read_last_stay(
    case: str, filed: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    path, first = filed
    clock = Clock()
    keys = KeyRing(path, allow_anonymous=False, clock=clock)
    path.write_text(BROKEN[case], encoding="utf-8")
    for _ in range(3):
        clock.now += RELOAD_INTERVAL_S
        assert keys.identify(first) is not None
    (record,) = caplog.records  # once, not at every look
    assert record.levelno == logging.ERROR
    assert not re.search(r"S{8}|[0-9a-f]{32}", record.getMessage())
    assert first not in record.getMessage()
    with pytest.raises(ServeError) as caught:
        KeyRing(path, allow_anonymous=False)
    assert not re.search(r"S{8}|[0-9a-f]{32}", str(caught.value))
    assert caught.value.hint


@PATIENT
@given(st.text(max_size=40) | st.text("[]{}:,-&*!?|>'\"# \nkeysidha2560\t%", max_size=40))
def test_any_text_is_keys_or_a_clear_refusal(text: str) -> None:
    with contextlib.suppress(ServeError):
        assert isinstance(parse_keys(text, "keys.yaml"), tuple)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="there is no key file"):
        KeyRing(tmp_path / "keys.yaml", allow_anonymous=True)
    with pytest.raises(ServeError, match="there is no key file"):
        read_keys(tmp_path / "keys.yaml")
    (tmp_path / "keys.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ServeError, match="cannot read the key file"):
        KeyRing(tmp_path / "keys.yaml", allow_anonymous=True)


def test_keys_come_from_the_environment_too(filed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, first = filed
    one, two = new_secret(), new_secret()
    monkeypatch.setenv("SOME_KEYS", f"one:{hash_of(one)}, two:{hash_of(two)},")
    keys = key_ring(Access(keys_file=str(path), keys_variable="SOME_KEYS"))
    assert [found.id for secret in (one, two, first) if (found := keys.identify(secret))] == ["one", "two", "first"]
    monkeypatch.delenv("SOME_KEYS")
    assert key_ring(Access(keys_variable="SOME_KEYS")).keys == ()


@pytest.mark.parametrize("value", [SECRET_TEXT, f"one:{SECRET_TEXT}", f"{'a' * 64}", f"one {'a' * 64}", f":{'a' * 64}"])
def test_a_bad_environment_is_refused_without_repeating_it(value: str) -> None:
    with pytest.raises(ServeError) as caught:
        keys_in_environment(value, "$SOME_KEYS")
    assert "$SOME_KEYS" in str(caught.value)
    assert value not in str(caught.value)
    assert "S" * 8 not in str(caught.value)


def test_a_key_as_text_does_not_show_its_hash() -> None:
    _, key = made("one")
    assert key.sha256 not in repr(key)
    assert key.sha256 not in str(key)
    assert "'one'" in repr(key)


def test_the_file_is_for_its_owner_alone_and_holds_no_key(filed: tuple[Path, str]) -> None:
    path, first = filed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in path.read_text(encoding="utf-8")
    assert hash_of(first) in path.read_text(encoding="utf-8")
    path.chmod(0o644)
    remove_key(path, "first")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["keys.yaml"], "nothing is left beside it"


def test_a_file_is_written_whole_or_not_at_all(filed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = filed
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("power is out")))
    _, key = made("second")
    with pytest.raises(OSError, match="power is out"):
        add_key(path, key)
    assert path.read_bytes() == before


NAMES = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True) | st.sampled_from(
    ["1e3", "1_0e5", "1e-3", "null", "true", "123", "1.5", "0x1f", "2026-01-01", "-", "...", ".inf", "y"]
)


@pytest.mark.slow
@PATIENT
@given(names=st.lists(NAMES, unique=True, max_size=4), model=st.text(min_size=1, max_size=12))
def test_what_is_written_is_read_back(names: list[str], model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    end = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    keys = [made(name, models=(model, "1e3"), expires=end, tokens_per_minute=5)[1] for name in names]
    for key in keys:
        add_key(path, key)
    assert not keys or read_keys(path) == tuple(keys)


def test_a_name_is_given_once(filed: tuple[Path, str]) -> None:
    path, _ = filed
    with pytest.raises(ServeError, match="already has a key named first"):
        add_key(path, made("first")[1])
    with pytest.raises(ServeError, match="id: "):
        make_key(new_secret(), id="no spaces")
    with pytest.raises(ServeError, match="no key named other"):
        remove_key(path, "other")


def test_the_commands_make_list_and_revoke_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    new = run(cli.app, ["keys", "new", "laptop", "--days", "3", "--requests-per-minute", "6", "--model", "student"])
    assert new.exit_code == 0
    secret = new.stdout.strip()
    keys = KeyRing(tmp_path / "keys.yaml", allow_anonymous=False)
    found = keys.identify(secret)
    assert found is not None
    assert (found.id, found.models, found.requests_per_minute) == ("laptop", ("student",), 6)
    assert found.expires is not None
    assert timedelta(days=2.9) < found.expires - datetime.now(UTC) <= timedelta(days=3)
    listed = run(cli.app, ["keys", "list"], env={"COLUMNS": "200"}).stdout
    assert "laptop" in listed
    assert "student" in listed
    assert found.sha256 not in listed
    assert secret not in listed
    assert run(cli.app, ["keys", "revoke", "laptop"]).stdout == "revoked laptop\n"
    assert read_keys(tmp_path / "keys.yaml") == ()


def test_a_printed_key_has_a_good_name_and_no_limits() -> None:
    for arguments in (["no spaces"], ["laptop", "--days", "3"], ["laptop", "--model", "student"]):
        done = CliRunner().invoke(cli.app, ["keys", "new", *arguments, "--print"])
        assert isinstance(done.exception, ServeError)
        assert "sk-" not in done.output


def test_a_key_can_be_printed_for_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair, secret = CliRunner().invoke(cli.app, ["keys", "new", "laptop", "--print"]).stdout.split()
    (key,) = keys_in_environment(pair, "it")
    assert ring(key).identify(secret) == key
    assert not (tmp_path / "keys.yaml").exists()


@pytest.mark.parametrize("arguments", [["revoke", "x"], ["list"], ["new", "a b"]])
def test_mistakes_of_the_commands_are_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sdft", "keys", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("sdft: ")
    assert error.count("\n") == 1
    assert " → " in error
