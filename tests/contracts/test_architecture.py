"""docs/architecture.md is the map of the code: rooms are folders, floors are the layers of import-linter."""

from __future__ import annotations

import re
import tomllib

from tests.support.documents import ROOT, pages

PAGE = pages()["docs/architecture.md"]


def rooms() -> set[str]:
    return {path.name for path in (ROOT / "sdft_ray").iterdir() if path.is_dir() and not path.name.startswith("__")}


def test_the_tree_is_the_tree() -> None:
    block = PAGE.split("## Rooms")[1].split("```")[1]
    named = set(re.findall(r"^  ([a-z_]+(?:\.py|/))  ", block, flags=re.MULTILINE))
    parts = [
        path for path in (ROOT / "sdft_ray").iterdir() if not path.name.startswith("__") and path.suffix in {"", ".py"}
    ]
    inside = {path.name + ("/" if path.is_dir() else "") for path in parts}
    assert named == inside


def test_floors_are_the_layers() -> None:

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    enforced = [{name.strip().removeprefix("sdft_ray.") for name in layer.split("|")} for layer in layers]
    table = PAGE.split("## Floors")[1]
    rows = re.findall(r"^\| (\d+) \| ([a-z_, ]+) \|", table, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(layers), 0, -1))
    assert [set(names.split(", ")) for _, names in rows] == enforced
    assert set().union(*enforced) - {"errors"} == rooms()


def test_files_and_folders_that_it_names_exist() -> None:
    named = set(re.findall(r"`((?:sdft_ray|tests|jobs|docs)/[\w./]+)`", PAGE))
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_stage_of_its_picture_is_one() -> None:
    from sdft_ray.stages.spec import VERSIONS

    flow = PAGE.split("## The flow")[1].split("## Rooms")[0]
    picture = flow.split("```")[1]
    drawn = set(re.findall(r"--> ([a-z]+)", picture)) - {"students", "distilled"}
    named = set(re.findall(r"`([a-z]+)`", flow.split("```")[2]))
    assert drawn | named <= set(VERSIONS)
    assert set(VERSIONS) - drawn - named == {"seed", "calibration", "texts", "why"}
