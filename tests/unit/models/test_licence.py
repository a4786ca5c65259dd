"""Licences as they are found: in a card, in a file's heading, on the hub, or not at all."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from sdft_ray.models.licence import Licence, find_licence
from tests.support.hub_server import Repo, hub_server

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = "Copyright (c) 2026 Somebody\n\nPermission is hereby granted, free of charge, to any person obtaining a copy"


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (APACHE, "apache-2.0"),
        (f"MIT License\n\n{MIT}", "mit"),
        (MIT, "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024", "llama3.1"),
        ("LLAMA 3.3 COMMUNITY LICENSE AGREEMENT", "llama3.3"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("Gemma Terms of Use\n\nLast modified", "gemma"),
        ("Terms of our own.\n" + "Be kind. " * 100 + APACHE, None),
        ("", None),
    ],
)
def test_by_the_heading_of_its_text(text: str, expected: str | None, tmp_path: Path) -> None:
    found = find_licence([folder(tmp_path, LICENSE__txt=text)])
    assert (found and found.identifier) == expected
    assert found is None or found.origin == "the file LICENSE.txt"


def test_a_card_comes_before_a_file_wherever_it_lies(tmp_path: Path) -> None:
    text = folder(tmp_path / "text", LICENSE=APACHE)
    card = folder(tmp_path / "card", README__md="---\nlicense: gemma\n---\n# A model")
    assert find_licence([text, card]) == Licence("gemma", origin="the teacher's model card")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("license: [mit]", ("mit", "", "")),
        ("license: other\nlicense_name: ours\nlicense_link: https://x.org/l", ("other", "ours", "https://x.org/l")),
        ("license: mit\nlicense_name: ignored", ("mit", "", "")),
        ("license: other", None),
        ("license: unknown", None),
        ("license: 'mit\\n# no'", None),
        ("license: 3", None),
        ("license: [mit, gpl]", None),
        ("tags: [a]", None),
        ("license: [unclosed", None),
    ],
)
def test_by_the_front_matter_of_a_card(fields: str, expected: tuple[str, str, str] | None, tmp_path: Path) -> None:
    found = find_licence([folder(tmp_path, README__md=f"---\n{fields}\n---\n\n# A model\n")])
    assert (found and (found.identifier, found.name, found.link)) == expected


def test_nothing_tells(tmp_path: Path) -> None:
    assert find_licence([]) is None
    assert find_licence([tmp_path / "gone", folder(tmp_path / "card", README__md="# No front matter")]) is None
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/README.md").write_bytes(b"\xff\xfe\x00")
    assert find_licence([tmp_path / "odd"]) is None


def test_the_hub_is_asked_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        hub.repos["org/model"] = Repo(private=False, metadata={"license": "llama3.2"})
        assert find_licence([folder(tmp_path, LICENSE=APACHE)], "org/model") == Licence(
            "apache-2.0", origin="the file LICENSE"
        )
        assert not hub.requests
        assert find_licence([], "org/model") == Licence("llama3.2", origin="the teacher's page on the hub")
        assert find_licence([], "org/other") is None
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_licence([], "org/model") is None
