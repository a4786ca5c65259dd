"""Every mistake: one clear line with a next step, exit code 2, before Ray is imported."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdft_ray.cli import app as cli
from sdft_ray.recipe.yaml_model import dump_yaml
from tests.support.recipes import write_rows
from tests.support.tiny import make_model
from tests.support.worlds import world_data, write_tasks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "model", "llama")


@pytest.fixture
def world(tmp_path: Path, teacher: Path) -> Path:
    """A folder with a teacher of its own, task files and rows."""
    shutil.copytree(teacher, tmp_path / "teacher")
    write_tasks(tmp_path)
    return tmp_path


def _recipe(world: Path, **changes: object) -> Path:
    data = world_data(world, **changes)
    path = world / "recipe.yaml"
    path.write_text(dump_yaml(json.loads(json.dumps(data))), encoding="utf-8")
    return path


def _fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the command; check exit code, one line, a next step, and that no Ray was started; return the line."""
    monkeypatch.setattr(sys, "argv", ["sdft", *map(str, arguments)])
    monkeypatch.setattr("sdft_ray.stages.session.ray_session", _no_ray)
    capsys.readouterr()  # what building the models has printed
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert error.count("\n") == 1
    assert error.startswith("sdft: ")
    assert " → " in error, "a next step"
    return error


def _no_ray(*_: object) -> None:
    pytest.fail("a worker was about to start")


def _seed_file(world: Path, text: str) -> dict[str, object]:
    (world / "bad.jsonl").write_text(text, encoding="utf-8")
    return {"seed_set": {"source": str(world / "bad.jsonl")}}


GOOD = '{"id": "a", "instruction": "x", "reference": "y"}\n'
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "empty file": ("", ("bad.jsonl", "no rows")),
    "malformed": (GOOD + "{oops\n", ("line 2", "not valid JSON")),
    "one id, two contents": (GOOD + GOOD.replace("y", "z"), ("'a'", "line 1", "line 2")),
    "nothing to train on": (
        '{"messages": [{"role": "user", "content": "x"}]}\n{"instruction": "x", "reference": ""}\n',
        ("none of its 2 rows", "ends with a user message", "the answer is empty"),
    ),
    "missing column": (
        GOOD + '{"id": "b", "instruction": "x", "referense": "y"}\n',
        ("line 2", "reference", "referense"),
    ),
    "prompt too long": (GOOD.replace("x", "x " * 3000), ("tokens", "context")),
}


@pytest.mark.parametrize("case", ROWS)
def test_seed_sets(case: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = ROWS[case]
    path = _recipe(world, **_seed_file(world, text))
    error = _fails(monkeypatch, capsys, "compress", path, "--store", world / "store")
    for part in says:
        assert part in error


def _edit_config(world: Path, **changes: object) -> None:
    path = world / "teacher/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    path.write_text(json.dumps(config), encoding="utf-8")


def _no_template(world: Path) -> None:
    (world / "teacher/chat_template.jinja").unlink(missing_ok=True)
    path = world / "teacher/tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    path.write_text(json.dumps(config), encoding="utf-8")


def _cut(world: Path) -> None:
    path = world / "teacher/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(world: Path) -> None:
    path = world / "teacher/model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def _small_embedding(world: Path) -> None:
    shutil.rmtree(world / "teacher")
    make_model(world / "teacher", "llama", tokenizer=True, vocab_size=128)
    shutil.copy(world / "teacher/model.safetensors", world / "keep")
    make_model(world / "bigger", "llama", tokenizer=True, vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world / "bigger" / name, world / "teacher" / name)


TEACHERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no chat template": (_no_template, ("chat template",)),
    "not a causal LM": (lambda world: _edit_config(world, architectures=["LlamaModel"]), ("causal",)),
    "unsupported": (
        lambda world: _edit_config(world, model_type="mamba", architectures=["MambaForCausalLM"]),
        ("mamba", "llama", "qwen3", "phi3"),
    ),
    "truncated": (_cut, ("model.safetensors",)),
    "corrupt": (_scramble, ("model.safetensors",)),
    "tokenizer too large": (_small_embedding, ("tokenizer",)),
    "no config": (lambda world: (world / "teacher/config.json").unlink(), ("config.json",)),
    "no weights": (lambda world: (world / "teacher/model.safetensors").unlink(), ("safetensors",)),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers(case: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    damage, says = TEACHERS[case]
    path = _recipe(world)
    damage(world)
    error = _fails(monkeypatch, capsys, "compress", path, "--store", world / "store")
    for part in says:
        assert part in error


CHANGES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown field": ({"teacherr": {}}, ("teacherr", "teacher")),
    "all blocks": ({"depth": {"remove_blocks": 4}}, ("4 of 4 blocks", "at most 3")),
    "unreachable size": ({"depth": {"max_parameters": 10}}, ("reaches the target", "smallest")),
    "no such block": ({"depth": {"metric": "explicit", "blocks": [9]}}, ("no block 9",)),
    "no seed file": ({"seed_set": {"source": "/nowhere/seed.jsonl"}}, ("/nowhere/seed.jsonl",)),
    "no data set": ({"seed_set": {"source": "gsm9k"}}, ("gsm9k", "gsm8k")),
    "no teacher": ({"teacher": {"model": "/nowhere/model"}}, ("/nowhere/model",)),
    "unpinned hub teacher": ({"teacher": {"model": "nobody/nothing"}}, ("nobody/nothing", "pin")),
    "tail too long": (
        {
            "train": {
                "num_steps": 1,
                "train_last_n_layers": 4,
                "arms": {"a": {"data": "reference", "learning_rate": 0.1}},
            }
        },
        ("train_last_n_layers is 4", "has 3 blocks"),
    ),
    "unknown template": ({"generate": {"template": "own_wards"}}, ("own_wards", "own_words")),
    "unknown task": ({"evaluate": {"tasks": [{"name": "gsm8kk"}]}}, ("gsm8kk", "gsm8k")),
    "no task folder": ({"evaluate": {"tasks": [{"name": "a"}], "include": "/nowhere"}}, ("/nowhere",)),
    "no held-out text": ({"forgetting": {"source": "/nowhere/texts.jsonl"}}, ("forgetting", "/nowhere/texts.jsonl")),
    "no embedding model": (
        {"forgetting": {"source": "calibration.jsonl", "embedding": "/nowhere/embedder"}},
        ("/nowhere/embedder",),
    ),
    "embedding by the teacher": (
        {"forgetting": {"source": "calibration.jsonl", "embedding": "teacher"}},
        ("LlamaForCausalLM", "not an encoder"),
    ),
    "row too long": (
        {
            "train": {
                "num_steps": 1,
                "max_seq_len": 8,
                "arms": {"a": {"data": "reference", "learning_rate": 0.1}},
            }
        },
        ("max_seq_len",),
    ),
}


# To name the nearest task, lm-eval reads thousands of task files.
_SLOW = "unknown task"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == _SLOW else case for case in CHANGES]
)
def test_recipes(case: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    changes, says = CHANGES[case]
    error = _fails(monkeypatch, capsys, "compress", _recipe(world, **changes), "--store", world / "store")
    for part in says:
        assert part in error


def test_missing_recipe(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothere.yaml" in _fails(monkeypatch, capsys, "compress", world / "nothere.yaml")


def test_store_that_cannot_be_written(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "file").write_text("", encoding="utf-8")
    assert "not writable" in _fails(monkeypatch, capsys, "compress", _recipe(world), "--store", world / "file/store")


def test_too_little_disk(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sdft_ray.store.store.Store.free_bytes", lambda self: 1000)
    error = _fails(monkeypatch, capsys, "compress", _recipe(world), "--store", world / "store")
    assert "free" in error
    assert "needed" in error


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("No space left on device (os error 28)")],
    ids=["python", "rust"],
)
def test_a_disk_that_fills_up_later(failure: Exception) -> None:
    from ray.exceptions import RayTaskError

    from sdft_ray.errors import StoreError
    from sdft_ray.stages.failures import Scene, as_ours

    error = as_ours(Scene("prune", "prune"), RayTaskError("task", "", failure))
    assert isinstance(error, StoreError)
    assert "prune" in error.message
    assert "run again" in error.hint


def test_a_failure_that_is_not_the_users_names_its_stage() -> None:
    from ray.exceptions import RayTaskError

    from sdft_ray.errors import StageError
    from sdft_ray.stages.failures import Scene, as_ours

    error = as_ours(Scene("evaluate:sft", "evaluate"), RayTaskError("task", "", RuntimeError("first line\nit broke")))
    assert isinstance(error, StageError)
    assert "evaluate:sft" in str(error)
    assert "RuntimeError: it broke" in str(error)


def test_too_few_cpus(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    resources = world / "resources.yaml"
    resources.write_text("cpus: 1\ntrain: {num_workers: 4}\n", encoding="utf-8")
    error = _fails(
        monkeypatch, capsys, "compress", _recipe(world), "--resources", resources, "--store", world / "store"
    )
    assert "train needs 4 CPUs" in error


def test_cpus_of_the_resources_count_where_the_system_tells_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `sched_getaffinity`."""
    from sdft_ray.errors import ResourceError
    from sdft_ray.pipeline.preflight import check_local_cpus
    from sdft_ray.recipe.resources import Resources

    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    few = Resources.model_validate({"cpus": 1, "train": {"num_workers": 4}})
    with pytest.raises(ResourceError, match="train needs 4 CPUs at once, but the cluster has 1"):
        check_local_cpus(few, {"train"})
    check_local_cpus(few.model_copy(update={"cpus": None}), {"train"})


def test_code_that_cannot_be_isolated_here(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdft_ray.generation import sandbox

    row = {"id": "a", "instruction": "add", "reference": "x", "answer_kind": "code", "check": "assert add(1, 2) == 3"}
    seed_set = _seed_file(world, json.dumps(row) + "\n")
    resources = world / "some.yaml"
    resources.write_text("train: {num_workers: 1}", encoding="utf-8")
    # As where the kernel refuses.
    monkeypatch.setattr(sandbox, "_CHILD", "import os\nos.write(3, b'refused: no namespace')")
    sandbox.check_sandbox.cache_clear()
    arguments = ("--resources", resources, "--store", world / "store")
    assert "code cannot be isolated" in _fails(monkeypatch, capsys, "compress", _recipe(world, **seed_set), *arguments)


def test_signals_that_the_sampler_cannot_give(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = world / "some.yaml"
    resources.write_text("train: {num_workers: 1}", encoding="utf-8")  # vLLM is the default
    recipe = _recipe(world, generate={"max_tokens": 16, "hidden_states": True})
    error = _fails(monkeypatch, capsys, "compress", recipe, "--resources", resources, "--store", world / "store")
    assert "the vllm sampler cannot provide generate.hidden_states" in error
    assert "generate.sampler: transformers" in error


def test_a_tracker_that_is_not_installed(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdft_ray.training.tracking.find_spec", lambda module: None)
    resources = world / "some.yaml"
    resources.write_text("{train: {num_workers: 1, tracking: [mlflow]}, generate: {sampler: transformers}}")
    arguments = ("--resources", resources, "--store", world / "store")
    error = _fails(monkeypatch, capsys, "compress", _recipe(world), *arguments)
    assert "lists mlflow, which is not installed" in error
    assert "pip install mlflow" in error


def test_a_tracker_that_is_not_known(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = world / "some.yaml"
    resources.write_text("train: {tracking: [tensorbored]}")
    error = _fails(monkeypatch, capsys, "compress", _recipe(world), "--resources", resources)
    assert "train.tracking.0" in error
    assert "'tensorboard', 'mlflow' or 'wandb'" in error


def test_an_optimizer_that_shards_cannot_have(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources = world / "some.yaml"
    resources.write_text("{train: {num_workers: 1, strategy: fsdp}}", encoding="utf-8")
    recipe = _recipe(world, train={**world_data(world)["train"], "optimizer": "muon"})
    error = _fails(monkeypatch, capsys, "compress", recipe, "--resources", resources, "--store", world / "store")
    assert "muon needs whole matrices" in error
    assert "train.strategy to ddp" in error


def test_signals_that_the_disk_cannot_hold(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdft_ray.store.store.Store.free_bytes", lambda self: 2**30)
    resources = world / "some.yaml"
    resources.write_text("{train: {num_workers: 1}, generate: {sampler: transformers}}", encoding="utf-8")
    arguments = ("--resources", resources, "--store", world / "store")
    asked = {"max_tokens": 10_000_000, "hidden_states": True}
    error = _fails(monkeypatch, capsys, "compress", _recipe(world, generate=asked), *arguments)
    assert "1.0 GiB free, but about 4." in error


def test_unknown_run(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run named 'x'" in _fails(monkeypatch, capsys, "show", "x", "--store", world / "store")


def test_the_good_recipe_passes_every_check(world: Path) -> None:
    """The counterpart of all tests above: what they break is the only thing wrong."""
    from sdft_ray.pipeline.preflight import preflight
    from sdft_ray.recipe.recipe import Recipe
    from sdft_ray.recipe.resources import Resources
    from sdft_ray.stages.graph import resolve
    from sdft_ray.stages.sources import Sources
    from sdft_ray.store.store import Store

    recipe, store = Recipe.load(_recipe(world)), Store(str(world / "store"))
    resources = Resources.model_validate({"train": {"num_workers": 1}})
    preflight(recipe, store, resources, resolve(recipe, store, Sources(recipe, store)))
    assert write_rows(world / "more.jsonl").exists()


REHEARSALS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "no such folder": ({"teacher": {"model": "./nowhere"}}, ("no model directory", "nowhere")),
    "empty seed set": ({"seed_set": {"source": "empty.jsonl"}}, ("empty.jsonl", "no rows")),
    "unknown template": ({"generate": {"template": "own_wrods"}}, ("own_wrods", "own_words")),
    "unknown field": ({"generate": {"min_keep": 0.5}}, ("min_keep",)),
}


@pytest.mark.parametrize("case", REHEARSALS)
def test_a_rehearsal_says_what_is_wrong_before_any_worker_starts(
    case: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, says = REHEARSALS[case]
    (world / "empty.jsonl").write_text("", encoding="utf-8")
    error = _fails(monkeypatch, capsys, "try", _recipe(world, **changes), "--store", world / "store")
    for part in says:
        assert part in error


def test_a_rehearsal_without_the_hub_says_so(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = _recipe(world, teacher={"model": "nobody/no-model"})
    error = _fails(monkeypatch, capsys, "try", recipe, "--store", world / "store")
    assert "nobody/no-model" in error
    assert "pin teacher.revision" in error
