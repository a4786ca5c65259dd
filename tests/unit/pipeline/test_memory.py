"""Memory is planned before anything starts: what is `auto` is chosen, and what does not fit is refused."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.cli.render import explanation_json
from sdft_ray.errors import ResourceError
from sdft_ray.models.machine import Machine
from sdft_ray.pipeline.explain import explain
from sdft_ray.pipeline.lengths import estimated_lengths, row_lengths
from sdft_ray.pipeline.memory import MemoryPlan, plan_memory, smallest
from sdft_ray.pipeline.scheduler import GraphRun, Scheduler
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, steps
from sdft_ray.stages.session import Capacity
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.store import Store
from tests.support.recipes import recipe_data
from tests.support.tiny import make_model

GIB = 2**30
SMALL = {  # a model of 135 million parameters
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher's tokenizer and the config of a larger model: weights are not read."""
    folder = tmp_path_factory.mktemp("memory")
    teacher = make_model(folder / "teacher", hidden=32)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | SMALL))
    (teacher / "model.safetensors").unlink()
    return folder


def _recipe(world: Path, **train: Any) -> Recipe:
    data = recipe_data(world, world / "teacher", generate={"max_tokens": 64})
    return Recipe.parse(data | {"train": data["train"] | {"max_seq_len": 512, "global_batch_size": 32} | train})


def _plan(recipe: Recipe, memory_gib: float, resources: dict[str, Any] | None = None, **options: Any) -> MemoryPlan:
    states = {step.name: State(step, "missing") for step in steps(recipe)}
    teacher = TeacherModel.of(recipe.teacher, recipe.chat)
    machine = Machine(2, int(memory_gib * GIB), 32 * GIB)
    return plan_memory(recipe, Resources.model_validate(resources or {}), teacher, states, machine=machine, **options)


def test_training_gets_what_memory_holds(world: Path) -> None:
    recipe = _recipe(world)
    chosen = {}
    for memory_gib in (24, 12, 7.5, 5.5):
        plan = _plan(recipe, memory_gib)
        train = plan.resources.train
        chosen[memory_gib] = train.num_workers, train.micro_batch_size
        assert plan.budget_bytes is not None
        assert max(plan.needs.values()) <= plan.budget_bytes
        trained = max(need for step, need in plan.needs.items() if step.startswith("train:"))
        assert memory_gib < 7 or trained <= plan.budget_bytes / 1.25, "where it can be, a prediction may be too low"
    assert chosen[24] == (2, 4), "2,048 tokens: more are not faster on a CPU"
    assert chosen[12][0] == 2, "two cores are used before rows are many"
    assert chosen[12][1] < 4
    assert chosen[7.5][0] == 1
    assert chosen[5.5] == (1, 1)


def test_what_is_given_stays(world: Path) -> None:
    given = {
        "train": {"num_workers": 1, "micro_batch_size": 3},
        "evaluate": {"max_model_tokens": 700, "kv_cache_bytes": 123 * 2**20},
        "generate": {"max_model_tokens": None},
    }
    resources = _plan(_recipe(world), 24, given).resources
    assert (resources.train.num_workers, resources.train.micro_batch_size) == (1, 3)
    assert (resources.evaluate.max_model_tokens, resources.evaluate.kv_cache_bytes) == (700, 123 * 2**20)
    assert resources.generate.max_model_tokens == 8192, "None is the context of the model"
    assert "auto" not in resources.model_dump_json().replace('"dtype":"auto"', ""), "an engine's node knows its CPU"


def test_the_context_holds_the_longest_prompt_and_its_response(world: Path) -> None:
    recipe = _recipe(world)
    teacher = TeacherModel.of(recipe.teacher, recipe.chat)
    lengths = row_lengths(recipe, teacher)
    from sdft_ray.data.rows import read_source
    from sdft_ray.generation.checks import check_error
    from sdft_ray.generation.prompts import render_rewrite

    rows = [row for table in read_source(recipe.seed_set, check_error) for row in table.to_pylist()]
    asked = [render_rewrite(recipe.generate.template, r["instruction"], r["reference_response"]) for r in rows]
    longest = max(len(teacher.chat.prompt_ids(text)) for text in asked)
    assert (lengths.num_rows, lengths.prompt_tokens) == (len(rows), longest)
    generate = _plan(recipe, 24).resources.generate
    context = -(-(longest + 64) // 128) * 128
    assert generate.max_model_tokens == context
    assert generate.kv_bytes >= context * 2 * 30 * 192 * 4
    near = estimated_lengths(recipe, world / "teacher")
    assert near.prompt_tokens == pytest.approx(longest, abs=64)


def test_no_memory_is_a_sentence_with_the_smallest_change(world: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"train:sft needs \d\.\d\d GiB of memory \(optimizer: .*it may have"
    ) as told:
        _plan(_recipe(world), 4)
    assert "other programs hold 28.00 GiB" in told.value.message
    assert "train.lora: {}" in told.value.hint
    with pytest.raises(ResourceError) as told:
        _plan(_recipe(world, max_seq_len=4096), 7)
    assert told.value.hint.startswith("set train.activation_checkpointing: true in the resources file, or free")
    with pytest.raises(ResourceError) as told:
        _plan(_recipe(world), 8, {"train": {"num_workers": 2, "micro_batch_size": 8}})
    assert told.value.hint.startswith("leave train.num_workers and train.micro_batch_size out")
    with pytest.raises(ResourceError, match="measure needs") as told:
        _plan(_recipe(world), 2.0)
    assert "free" in told.value.hint


def test_a_cache_smaller_than_one_context_is_refused_here_and_not_by_a_worker(world: Path) -> None:
    asked = {"evaluate": {"kv_cache_bytes": 256 * 2**20, "max_model_tokens": 8192}}
    with pytest.raises(ResourceError, match=r"evaluate\.kv_cache_bytes is 0\.25 GiB and holds 5,825 tokens") as told:
        _plan(_recipe(world), 24, asked)
    assert "lower evaluate.max_model_tokens to 5,632" in told.value.hint
    with pytest.raises(ResourceError, match=r"generate\.max_model_tokens is 9,000, but the model has a context of"):
        _plan(_recipe(world), 24, {"generate": {"max_model_tokens": 9000}})
    chosen = _plan(_recipe(world), 24).resources.evaluate
    assert isinstance(chosen.kv_cache_bytes, int)
    assert chosen.kv_cache_bytes >= (8192 + 128) * 2 * 30 * 192 * 4, "vLLM keeps one block of 128 tokens free"


def test_a_context_that_memory_does_not_hold_is_cut_and_said(world: Path) -> None:
    plan = _plan(_recipe(world, lora={}), 4.6)
    assert plan.resources.evaluate.max_model_tokens in (1024, 2048, 4096)
    assert any("longer items lose their beginning" in sentence for sentence in plan.assumed)


def test_nobody_knows_the_nodes_of_a_cluster_before_it_is_joined(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    recipe = _recipe(world)
    states = {step.name: State(step, "missing") for step in steps(recipe)}
    plan = plan_memory(recipe, Resources(), TeacherModel.of(recipe.teacher, recipe.chat), states)
    assert plan.budget_bytes is None
    assert (plan.resources.train.num_workers, plan.resources.train.micro_batch_size) == (2, 4)
    assert any("RAY_ADDRESS" in sentence for sentence in plan.assumed)


def test_explain_shows_needs_and_refuses_nothing(world: Path, tmp_path: Path) -> None:
    resources = Resources(memory_bytes=4 * GIB)
    told = explanation_json(explain(_recipe(world), Store(str(tmp_path)), resources))["memory"]
    train = next(step for step in told["steps"] if step["step"] == "train:sft")
    assert train["need_bytes"] > train["has_bytes"]
    assert train["settings"] == "1 x 1 rows"
    assert told["resources"]["train"]["micro_batch_size"] == 1
    json.dumps(told)


def test_recipes_that_run_side_by_side_take_the_least(world: Path) -> None:
    plans = [_plan(_recipe(world), 24), _plan(_recipe(world, max_seq_len=4096), 24)]
    train = smallest(plans).resources.train
    assert train == plans[1].resources.train
    assert train.micro_batch_rows < plans[0].resources.train.micro_batch_rows


def test_steps_wait_for_memory_but_never_for_ever(world: Path, tmp_path: Path) -> None:
    """One that fits alone is admitted when nothing else runs, whatever its need."""
    recipe = _recipe(world)
    known = steps(recipe)
    walk = GraphRun(recipe, Store(str(tmp_path)), Resources(), "r", known)
    states = {step.name: State(step, "missing") for step in known}
    walk.memory = {"measure": 3 * GIB, "gap": 3 * GIB, "select": GIB, "prune": 9 * GIB}
    scheduler = Scheduler([walk], Resources(), Capacity(8.0, 0.0, 5.0 * GIB), None, lambda event: None, Path("log"))
    assert scheduler._fits(walk, states["prune"])
    scheduler._running = {Future(): (walk, states["measure"])}
    assert not scheduler._fits(walk, states["gap"])
    assert scheduler._fits(walk, states["select"])
