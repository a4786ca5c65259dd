"""From names to directories: runs, artifacts, plain directories; what is damaged or no model is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.cli.serving import _settings
from sdft_ray.errors import ModelError, ServeError, StoreError
from sdft_ray.serving.sources import LocatedModel, locate, named
from sdft_ray.store import files
from sdft_ray.store.fingerprint import fingerprint
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store, address_of
from tests.support.recipes import make_recipe
from tests.support.tiny import make_model

SCORES = {"teacher": 0.8, "pruned": 0.2, "sft": 0.4, "sdft": 0.6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture
def directory(tmp_path: Path, model: Path) -> Path:
    """A model's directory of one's own, which one may damage."""
    return Path(shutil.copytree(model, tmp_path / "student"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def commit(store: Store, step: str, source: Path | None, summary: dict[str, Any] | None = None) -> Manifest:
    """An artifact with a copy of a directory's files."""
    digest = fingerprint({"step": step})
    stage = step.partition(":")[0]
    address = address_of(stage, digest)
    output = store.work(address) / "output"
    if source is None:
        output.mkdir()
    else:
        shutil.copytree(source, output)
        (output / files.HISTORY).write_text("", encoding="utf-8")
    manifest = Manifest(
        step, stage, address, digest, "{}", {}, store.place(address, output), Usage(), summary or {"residuals": []}
    )
    store.commit(manifest)
    return manifest


def scores_in(folder: Path, value: float) -> Path:
    task = {
        "task": "tiny_task", "metric": "acc", "filter": "none", "value": value, "stderr": 0.1, "n": 10,
        "num_fewshot": 0, "higher_is_better": True, "chance": 0.0, "outputs": [],
        "items": {str(item): float(item < 10 * value) for item in range(10)},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / files.SCORES).write_text(json.dumps({"tasks": {"tiny_task": task}, "num_truncated": 0}), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path, store: Store) -> dict[str, Manifest]:
    """A finished run named `quick`, all of whose models are the same; its artifacts by step."""
    recipe = make_recipe(tmp_path, model)
    size = {"num_blocks": 4, "num_parameters": 9, "matmul_flops_per_token": 9, "kv_bytes_per_token": 9}
    sizes = {name: {**size, "weight_bytes": 9} for name in ("teacher", "pruned")}
    made = {
        "prune": commit(store, "prune", model, {"sizes": sizes}),
        "report": commit(store, "report", None, {"gates": []}),
        **{f"train:{arm}": commit(store, f"train:{arm}", model) for arm in ("sft", "sdft")},
    }
    for name, value in SCORES.items():
        made[f"evaluate:{name}"] = commit(store, f"evaluate:{name}", scores_in(tmp_path / "scores" / name, value))
    steps = {step: {"address": manifest.address, "skipped": False} for step, manifest in made.items()}
    store.write_run("quick", {"name": "quick", "recipe": recipe.to_yaml(), "steps": steps})
    return made


def test_a_directory_is_served_under_its_own_name(directory: Path, store: Store) -> None:
    (asked,) = named((str(directory),), store)
    assert (asked.name, asked.source) == ("student", str(directory))
    located = locate(asked.source, store)
    assert (located.directory, located.address) == (directory.resolve(), "")
    assert located.facts["num_blocks"] == 4
    assert located.facts["weight_bytes"] == 4 * located.facts["num_parameters"]


@pytest.mark.parametrize(
    ("folder", "name"), [("my model (2)", "my-model-2"), (".hidden", "hidden"), ("größe", "gr-e"), ("模型", "model")]
)
def test_any_directory_gets_a_name_that_clients_can_write(
    folder: str, name: str, directory: Path, store: Store
) -> None:
    place = directory.rename(directory.with_name(folder))
    assert [each.name for each in named((f"{place}/",), store)] == [name]


def test_the_directory_one_is_in(directory: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    assert [each.name for each in named((".",), store)] == ["student"]


def test_an_artifact_is_served_by_its_address(model: Path, store: Store) -> None:
    made = commit(store, "prune", model)
    located = locate(made.address, store)
    assert located.directory == store.path(made.address)
    assert (located.address, located.facts["role"]) == (made.address, "pruned")
    (asked,) = named((made.address,), store)
    assert asked.source == made.address


def test_a_run_is_its_best_student_or_the_model_that_is_named(run: dict[str, Manifest], store: Store) -> None:
    assert [(each.name, each.source) for each in named(("quick",), store)] == [("sdft", "quick:sdft")]
    assert locate("quick", store) == locate("quick:sdft", store)
    best = locate("quick:sdft", store)
    assert (best.address, best.facts["role"]) == (run["train:sdft"].address, "student")
    assert best.facts["recovery"] == pytest.approx(0.6 / 0.8)
    pruned, teacher = locate("quick:pruned", store), locate("quick:teacher", store)
    assert (pruned.address, pruned.facts["role"]) == (run["prune"].address, "pruned")
    assert (teacher.address, teacher.facts["role"], teacher.facts["recovery"]) == ("", "teacher", None)


def test_all_models_of_a_run(run: dict[str, Manifest], store: Store) -> None:
    found = {each.name: each.source for each in named(("quick:all",), store)}
    assert found == {name: f"quick:{name}" for name in ("teacher", "pruned", "sft", "sdft")}
    assert all(isinstance(locate(source, store), LocatedModel) for source in found.values())


def test_two_of_a_name_are_told_apart_and_the_same_twice_is_refused(
    run: dict[str, Manifest], directory: Path, store: Store
) -> None:
    same = directory.rename(directory.with_name("sdft"))
    assert [each.name for each in named((str(same), "quick"), store)] == ["sdft", "quick-sdft"]
    other = Path(shutil.copytree(same, same.parent / "other" / "sdft"))
    first, second = (each.name for each in named((str(same), str(other)), store))
    assert first == "sdft"
    assert second.endswith("other-sdft")
    with pytest.raises(ServeError, match="given twice"):
        named(("quick:sft", "quick:sft", "quick:sft"), store)


@pytest.mark.parametrize("source", ["nothing", "prune/0123456789abcdef", "a/b/c", "", "../..", "nothing:teacher"])
def test_what_is_neither_run_nor_artifact_nor_directory_is_refused_with_what_there_is(
    source: str, run: dict[str, Manifest], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.rmtree(tmp_path / "scores")
    for ask in (lambda: named((source,), store), lambda: locate(source, store)):
        with pytest.raises((ServeError, ModelError)) as caught:
            ask()
        assert "quick" in str(caught.value) or "config.json" in str(caught.value)
        assert caught.value.hint


def test_a_model_that_the_run_does_not_have(run: dict[str, Manifest], store: Store) -> None:
    with pytest.raises(ServeError, match="no model 'sfdt'") as caught:
        locate("quick:sfdt", store)
    assert "sdft" in caught.value.hint


def test_a_run_whose_report_is_gone_is_refused(run: dict[str, Manifest], store: Store) -> None:
    shutil.rmtree(store.path(run["report"].address))
    for ask in (lambda: named(("quick",), store), lambda: locate("quick:sft", store)):
        with pytest.raises(StoreError, match="run quick is incomplete"):
            ask()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_artifact_is_refused_with_the_file(name: str, model: Path, store: Store) -> None:
    made = commit(store, "prune", model)
    path = store.path(made.address) / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=f"is damaged: {name}"):
        locate(made.address, store)
    path.unlink()
    with pytest.raises(StoreError, match=f"is damaged: {name}"):
        locate(made.address, store)


def test_a_damaged_student_of_a_run_is_refused(run: dict[str, Manifest], store: Store) -> None:
    path = store.path(run["train:sdft"].address) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"is damaged: model\.safetensors"):
        locate("quick", store)
    locate("quick:sft", store)


def test_an_artifact_that_holds_no_model_is_refused(store: Store) -> None:
    made = commit(store, "report", None)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        locate(made.address, store)


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def other_architecture(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["Mamba"]}), encoding="utf-8")


def other_size(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "num_hidden_layers": 5}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model.safetensors"),
        (scramble, "model.safetensors"),
        (other_architecture, "mamba"),
        (other_size, "lacks the tensor"),
        (lambda directory: (directory / "model.safetensors").unlink(), "safetensors"),
        (lambda directory: (directory / "config.json").unlink(), "config.json"),
        (lambda directory: (directory / "config.json").write_text("{", encoding="utf-8"), "config.json"),
    ],
    ids=["truncated", "scrambled", "architecture", "size", "no weights", "no config", "broken config"],
)
def test_a_directory_that_no_engine_could_load_is_refused(
    damage: Any, says: str, directory: Path, store: Store
) -> None:
    damage(directory)
    for ask in (lambda: named((str(directory),), store), lambda: locate(str(directory), store)):
        with pytest.raises(ModelError) as caught:
            ask()
        assert says in str(caught.value)
        assert caught.value.hint


@pytest.mark.usefixtures("run")
def test_a_draft_proposes_to_every_other_model(store: Store) -> None:
    def names(draft: str) -> dict[str, str | None]:
        settings = _settings(["quick:all"], None, store.url, "vllm", "float32", draft, None, allow_anonymous=False)
        assert {model.engine.dtype for model in settings.models} == {"float32"}, "drafted ones too"
        return {model.name: model.draft.source if model.draft else None for model in settings.models}

    alone = dict.fromkeys(("teacher", "pruned", "sft", "sdft"))
    expected = {**alone, **{f"{name}+draft": "quick:sdft" for name in ("teacher", "pruned", "sft")}}
    assert names("quick") == names("quick:sdft") == expected
    with pytest.raises(ServeError, match="stands for several models"):
        names("quick:all")
