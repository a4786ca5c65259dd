"""`explain` on complete recipes: sizes from arithmetic alone, and reasons that name what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdft_ray.cli.render import explanation_json, print_explanation
from sdft_ray.errors import PlanError, ResourceError, StoreError
from sdft_ray.generation.footprint import pass_bytes
from sdft_ray.models import precision
from sdft_ray.models.size import size_of
from sdft_ray.pipeline import preflight
from sdft_ray.pipeline.explain import explain
from sdft_ray.pipeline.preflight import check_disk, check_precision, planned_size, planned_sizes
from sdft_ray.recipe.pruning import Depth, Width
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import resolve
from sdft_ray.stages.sources import Sources
from sdft_ray.store.fingerprint import canonical_json
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store
from tests.support.recipes import make_recipe, recipe_data
from tests.support.tiny import make_model

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_are_sized(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    explanation = explain(recipe, Store(str(tmp_path)))
    assert recipe.name == path.stem
    assert explanation.teacher is not None
    assert explanation.pruned is not None
    assert explanation.pruned.num_parameters < explanation.teacher.num_parameters
    assert {line.status for line in explanation.lines} == {"missing", "waits"}


def test_the_papers_sizes_come_out(tmp_path: Path) -> None:
    """METHOD: 8.030B to 6.722B, -16.30 % parameters, -17.44 % matmul FLOPs, KV 131072 to 106496 bytes."""
    explanation = explain(Recipe.load(ROOT / "jobs/recipes/llama31_8b_instruct_depth6_sdft.yaml"), Store(str(tmp_path)))
    teacher, pruned = explanation.teacher, explanation.pruned
    assert teacher is not None
    assert pruned is not None
    assert (teacher.num_parameters, pruned.num_parameters) == (8_030_261_248, 6_721_589_248)
    assert round(100 * (1 - pruned.num_parameters / teacher.num_parameters), 2) == 16.30
    assert round(100 * (1 - pruned.matmul_flops_per_token / teacher.matmul_flops_per_token), 2) == 17.44
    assert (teacher.kv_bytes_per_token, pruned.kv_bytes_per_token) == (131072, 106496)


def test_a_shape_that_transformers_would_refuse(tmp_path: Path) -> None:
    """Phi-3 with longrope and fewer hidden channels, but as many heads: said before anything is pruned."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    rope = {**factors, "original_max_position_embeddings": 128, "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    make_model(tmp_path / "teacher", "phi3", rope_parameters=rope)
    store = Store(str(tmp_path / "store"))
    assert explain(make_recipe(tmp_path, tmp_path / "teacher"), store).pruned is not None
    with pytest.raises(PlanError, match="longrope"):
        explain(make_recipe(tmp_path, tmp_path / "teacher", width={"hidden": 0.5}), store)


def test_minitrons_sizes_come_out() -> None:
    """METHOD: hidden 3072 and MLP 9216 with all heads make 4.513B, 16 blocks 4.540B (arXiv:2408.11796)."""
    recipe = Recipe.load(ROOT / "jobs/recipes/llama31_8b_instruct_depth6_sdft.yaml")
    config = json.loads((ROOT / "jobs/recipes/configs/llama31_8b_instruct.json").read_text(encoding="utf-8"))
    width = Width(hidden=3072, mlp=9216, multiple_of=128, tensor_parallel=8)
    every = Depth(metric="explicit", blocks=())
    narrow = planned_size(recipe.model_copy(update={"depth": every, "width": width}), config)
    short = planned_size(recipe.model_copy(update={"depth": Depth(remove_blocks=16)}), config)
    assert narrow is not None
    assert short is not None
    assert [round(size.num_parameters / 1e9, 3) for size in (narrow, short)] == [4.513, 4.540]


@pytest.mark.parametrize("path", sorted((ROOT / "cluster/resources").glob("*.yaml")), ids=lambda path: path.stem)
def test_resource_profiles_parse(path: Path) -> None:
    assert (Resources.load(path).generate.gpus > 0) is path.stem.startswith("gpu")


def test_a_missing_step_names_what_differs(tmp_path: Path) -> None:
    make_model(tmp_path / "teacher", "llama")
    store = Store(str(tmp_path / "store"))
    store.check_writable()
    data = recipe_data(tmp_path, tmp_path / "teacher")
    state = resolve(Recipe.parse(data), store, Sources(Recipe.parse(data), store))["generate"]
    store.commit(
        Manifest(
            "generate",
            "generate",
            state.address,
            state.fingerprint,
            canonical_json(state.identity),
            {},
            {},
            Usage(wall_s=2),
        )
    )
    lines = {line.step: line for line in explain(Recipe.parse(data), store).lines}
    assert lines["generate"].status == "done"
    changed = Recipe.parse({**data, "generate": {"max_tokens": 99}})
    lines = {line.step: line for line in explain(changed, store).lines}
    assert lines["generate"].status == "missing"
    assert "max_tokens: 16 → 99" in lines["generate"].why
    assert "waits for the plan" in lines["train:sft"].why


def test_the_teachers_pass_is_counted_before_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "teacher", "llama")
    store = Store(str(tmp_path / "store"))
    data = recipe_data(tmp_path, tmp_path / "teacher")
    asked = {"max_tokens": 100, "top_logprobs": 16, "hidden_states": True}
    explanation = explain(Recipe.parse({**data, "generate": asked}), store)
    assert explanation.generated is not None
    assert (explanation.generated.num_rows, explanation.generated.total) == (6, 6 * 100 * (8 + 38 + 64))
    assert explanation_json(explanation)["generated"]["per_token"]["hidden_states"] == 64
    print_explanation(explanation)
    assert (
        "generate writes at most 64.5 KiB: 6 rows x 100 tokens x 110 bytes (text 8, top log-probabilities 38, "
        "hidden states 64); an upper bound" in capsys.readouterr().out
    )
    limited = {**data, "seed_set": {**data["seed_set"], "limit": 4}}
    generated = explain(Recipe.parse(limited), store).generated
    assert generated is not None
    assert (generated.num_rows, generated.per_token.total) == (4, 4)


def test_the_engines_of_missing_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the type that is faster here and no less exact than the recipe; what would be less exact is refused."""
    state = lambda *, test: "absent" if not test else pytest.fail("it is tested")  # noqa: E731
    monkeypatch.setattr(precision, "bfloat16_state", state)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_model(tmp_path / "teacher", "llama", dtype="bfloat16")
    store = Store(str(tmp_path / "store"))
    data = recipe_data(tmp_path, tmp_path / "teacher")
    recipe = Recipe.parse({**data, "teacher": {**data["teacher"], "dtype": "bfloat16"}})
    explanation = explain(recipe, store)
    assert {stage: use.words for stage, use in explanation.engines.items()} == {
        "generate": "vLLM, float32 (checkpoint bfloat16)",
        "evaluate": "vLLM, float32 (checkpoint bfloat16)",
    }
    print_explanation(explanation)
    told = (
        "Engine of generate: vLLM, float32 (checkpoint bfloat16); it is faster than bfloat16 on this CPU, which has no "
        "instructions for bfloat16.\n"
    )
    assert told in capsys.readouterr().out
    asked = {"generate": {"dtype": "bfloat16"}, "evaluate": {"sampler": "transformers", "gpus": 1.0}}
    engines = explain(recipe, store, Resources.model_validate(asked)).engines
    assert engines["generate"].words == "vLLM, bfloat16"
    assert engines["evaluate"].words == "transformers, auto (checkpoint bfloat16)"
    scripted = Resources.model_validate({"generate": {"sampler": "scripted"}})
    assert set(explain(recipe, store, scripted).engines) == {"evaluate"}
    with pytest.raises(ResourceError, match=r"generate.dtype is bfloat16, which is less exact than float32"):
        explain(Recipe.parse(data), store, Resources.model_validate(asked))
    monkeypatch.setattr(preflight, "bfloat16_state", lambda *, test: "SIGILL" if test else "untested")
    asked = Resources.model_validate({"generate": {"dtype": "bfloat16"}})
    check_precision(recipe, asked)
    with pytest.raises(ResourceError, match="SIGILL"):
        check_precision(recipe, asked, tests_bfloat16=True)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_precision(recipe, asked, tests_bfloat16=True)
    assert "on the node" in explain(recipe, store).engines["generate"].precision.why


@pytest.mark.slow
@pytest.mark.parametrize("command", [["explain", str(RECIPES[0])], ["--help"], ["ls"]], ids=lambda command: command[0])
def test_light_commands_load_neither_torch_nor_ray(command: list[str], tmp_path: Path) -> None:
    """Their speed is a benchmark, `jobs/bench/startup.py`; what they import decides it."""
    environment = {**os.environ, "SDFT_STORE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sdft_ray.cli", *command],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sdft_ray.errors" in loaded
    assert not {"torch", "ray", "vllm", "transformers", "datasets"} & loaded


def test_room_on_the_disk_for_every_step_at_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 4 bytes a parameter: surgery writes one copy; training two, and 12 bytes a parameter of its state."""
    step = {"depth": {"remove_blocks": 1}, "arm": {"data": "reference", "learning_rate": 1.0}, "num_steps": 1}
    arms = {name: {"data": "reference", "learning_rate": 1.0} for name in ("a", "b")}
    teacher = make_model(tmp_path / "teacher", num_blocks=4)
    recipe = make_recipe(tmp_path, teacher, steps=(step,), train={"num_steps": 1, "arms": arms})
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    sizes = planned_sizes(recipe, config)
    assert sizes is not None
    assert {name: size.num_blocks for name, size in sizes.items()} == {"step1": 3, "": 2}
    store, generated = Store(str(tmp_path / "store")), pass_bytes(recipe.generate, config, 10)
    states = resolve(recipe, store, Sources(recipe, store))
    needed = 64 * 2**20 + 24 * sizes["step1"].num_parameters + (4 + 2 * 20) * sizes[""].num_parameters
    needed += generated.total or 0
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed)
    check_disk(recipe, store, size_of(config), sizes, generated, states)
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed - 1)
    with pytest.raises(StoreError, match="free some space"):
        check_disk(recipe, store, size_of(config), sizes, generated, states)
