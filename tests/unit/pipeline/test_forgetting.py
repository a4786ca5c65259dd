"""A recipe that asks what was forgotten: which steps it makes, what moves them, and what is refused at the start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import DataError, ModelError, RecipeError
from sdft_ray.pipeline.preflight import check_forgetting
from sdft_ray.recipe.inputs import Forgetting
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, Step, input_addresses, resolve, steps
from sdft_ray.stages.sources import Sources, embedding_source
from sdft_ray.stages.spec import Demand, demand
from sdft_ray.stages.teacher import TeacherModel
from sdft_ray.store.fingerprint import canonical_json
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store
from tests.support.embedder import make_embedder
from tests.support.recipes import recipe_data, write_rows
from tests.support.tiny import make_model

OURS = {"texts", "forget", "likeness"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "teacher")
    make_embedder(folder / "embedder", pooling="mean")
    write_texts(folder / "texts.jsonl", ["Tom has 12 apples.", "Who is taller?", "fig, pear"])
    return folder


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"reference": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def recipe(world: Path, forgetting: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    asked = None if forgetting is None else {"source": str(world / "texts.jsonl"), **forgetting}
    return Recipe.parse(recipe_data(world, world / "teacher", forgetting=asked, **changes))


def named(asked: Recipe) -> dict[str, Step]:
    return {step.name: step for step in steps(asked)}


# -- the steps -------------------------------------------------------------------------------------------------


def test_without_it_all_steps_are_what_they_were(world: Path) -> None:
    plain, asked = named(recipe(world)), named(recipe(world, {}))
    assert not OURS & {step.stage for step in plain.values()}
    for name, step in plain.items():
        if name != "report":
            assert asked[name] == step
    assert asked["report"].slice == plain["report"].slice
    assert list(plain) == [name for name in asked if asked[name].stage not in OURS]


def test_every_model_that_is_evaluated_is_measured(world: Path) -> None:
    arms = {
        "sft": {"data": "reference", "learning_rate": (1e-3, 2e-3)},
        "sdft": {"data": "distilled", "learning_rate": 1e-3},
    }
    train = {"num_steps": 2, "validation_fraction": 0.3, "arms": arms}
    merges = {"both": {"arms": ("sft", "sdft")}}
    asked = recipe(world, {"embedding": str(world / "embedder")}, train=train, merges=merges, patch={})
    found = named(asked)
    models = [step.label for step in found.values() if step.stage == "evaluate"]
    assert models == ["teacher", "pruned", "patched", "sft", "sdft", "both"]
    assert [step.label for step in found.values() if step.stage == "forget"] == models
    assert [step.label for step in found.values() if step.stage == "likeness"] == models[1:]
    made = {model: found[f"forget:{model}"].inputs.get("model") for model in models}
    assert made == {model: found[f"evaluate:{model}"].inputs.get("model") for model in models}
    assert made["sft"] == "choose:sft"
    for model in models[1:]:
        answers = {"teacher_answers": "evaluate:teacher", "answers": f"evaluate:{model}"}
        assert found[f"likeness:{model}"].inputs == answers
    order = list(found)
    for step in found.values():
        assert all(order.index(name) < order.index(step.name) for name in step.inputs.values())
    without = named(recipe(world, {}, train=train, merges=merges, patch={}))
    assert set(found) - set(without) == {f"likeness:{model}" for model in models[1:]}


def test_an_earlier_step_of_pruning_is_not_measured(world: Path) -> None:
    arm = {"data": "reference", "learning_rate": 1e-3}
    first = {"depth": {"remove_blocks": 1}, "arm": arm, "num_steps": 1}
    found = named(recipe(world, {}, steps=(first,)))
    assert {step.label for step in found.values() if step.stage == "forget"} == {"teacher", "pruned", "sft", "sdft"}


@pytest.mark.parametrize("stage", ["forget", "likeness"])
def test_a_step_holds_what_the_gap_holds(stage: str) -> None:
    resources = Resources.model_validate({"gap": {"cpus": 2.5, "gpus": 1}})
    assert demand(stage, resources) == demand("gap", resources) == Demand(2.5, 1)
    assert demand("texts", resources) == Demand(0.0)


# -- what moves which address ----------------------------------------------------------------------------------


def commit(store: Store, state: State, **summary: Any) -> None:
    store.commit(
        Manifest(
            state.step.name, state.step.stage, state.address, state.fingerprint, canonical_json(state.identity), {},
            {}, Usage(), summary,
        )
    )  # fmt: skip


def walked(asked: Recipe, store: Store) -> dict[str, State]:
    """States after everything is committed; a choice takes the second trial."""
    store.check_writable()
    while True:
        states = resolve(asked, store, Sources(asked, store))
        state = next((state for state in states.values() if state.status == "missing"), None)
        if state is None:
            return states
        summaries = {"plan": {"plan": {"keep_blocks": [0, 1, 2]}}, "choose": {"chosen": "trial_2"}}
        commit(store, state, **summaries.get(state.step.stage, {}))


def addresses(asked: Recipe, store: Store) -> dict[str, str]:
    """Of a recipe without a grid, where only the plan must be known."""
    store.check_writable()
    state = resolve(asked, store, Sources(asked, store))["plan"]
    if state.status == "missing":
        commit(store, state, plan={"keep_blocks": [0, 1, 2]})
    return {name: state.address for name, state in resolve(asked, store, Sources(asked, store)).items()}


def moved(world: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Steps other than the report whose address differs; each side is a recipe's changes."""
    store = Store(str(tmp_path))
    first, second = (
        addresses(recipe(world, side["forgetting"], **{k: v for k, v in side.items() if k != "forgetting"}), store)
        for side in (before, after)
    )
    return {name for name in first if name in second and first[name] != second[name]} - {"report"}


FORGETS = {f"forget:{model}" for model in ("teacher", "pruned", "sft", "sdft")}
LIKENESSES = {f"likeness:{model}" for model in ("pruned", "sft", "sdft")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_rows": 2}, {"texts"} | FORGETS),
        ({"limit": 2}, {"texts"} | FORGETS),
        ({"sample": 2}, {"texts"} | FORGETS),
        ({"columns": {"id": "id"}}, {"texts"} | FORGETS),
        ({"source": "other.jsonl"}, {"texts"} | FORGETS),
        ({"max_tokens": 77}, FORGETS),
        ({"embedding": "other"}, LIKENESSES),
        ({"num_rows": 256, "max_tokens": 1024}, set()),
    ],
)
def test_what_a_change_of_the_part_moves(
    world: Path, tmp_path: Path, change: dict[str, Any], expected: set[str]
) -> None:
    write_texts(world / "other.jsonl", ["something else"])
    if not (world / "other").exists():
        make_embedder(world / "other", seed=1)
    places = {name: str(world / value) for name, value in change.items() if name in {"source", "embedding"}}
    before = {"embedding": str(world / "embedder")}
    assert moved(world, tmp_path, {"forgetting": before}, {"forgetting": {**before, **change, **places}}) == expected


def test_all_fields_are_tried_above(world: Path) -> None:
    fields = set(Forgetting.model_fields) - {"revision", "embedding_revision", "answer_kind", "check"}
    assert fields == {"num_rows", "limit", "sample", "columns", "source", "max_tokens", "embedding"}
    found = named(recipe(world, {"answer_kind": "list", "check": "x"}))
    assert found["texts"].slice == {"answer_kind": "list", "check": "x"}


def test_rows_of_the_seed_set_are_part_of_the_identity(world: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"forgetting": {}}
    assert moved(world, tmp_path, plain, {**plain, "gap": {"num_rows": 3}}) == {"gap", "gap:pruned"} | FORGETS
    assert moved(world, tmp_path, plain, {**plain, "gap": {"max_stderr": 0.1}}) == {"gap", "gap:pruned"}
    train = recipe_data(world, world / "teacher")["train"]
    held_out = {**plain, "train": {**train, "validation_fraction": 0.3}}
    assert moved(world, tmp_path, plain, held_out) >= FORGETS
    deeper = moved(world, tmp_path, plain, {**plain, "replicate": 2})
    assert deeper >= FORGETS | {"texts"}


def test_another_plan_measures_the_teacher_no_second_time(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    before = addresses(recipe(world, {}), store)
    other = recipe(world, {}, depth={"metric": "explicit", "blocks": (0,)})
    plan = resolve(other, store, Sources(other, store))["plan"]
    commit(store, plan, plan={"keep_blocks": [1, 2, 3]})
    after = addresses(other, store)
    assert {name for name in FORGETS | {"texts"} if before[name] == after[name]} == {"forget:teacher", "texts"}


def test_a_student_that_a_grid_chose_is_measured_once(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    embedding = {"embedding": str(world / "embedder")}
    train = {"num_steps": 2, "validation_fraction": 0.3}
    arm = {"data": "reference", "learning_rate": (1e-3, 2e-3)}
    states = walked(recipe(world, embedding, train={**train, "arms": {"a": arm}}), store)
    assert input_addresses(states["forget:a"].step, states)["model"] == states["train:a@0.002"].address
    alone = recipe(world, embedding, train={**train, "arms": {"b": {**arm, "learning_rate": 2e-3}}})
    single = resolve(alone, store, Sources(alone, store))
    for stage in ("forget", "likeness"):
        assert single[f"{stage}:b"].status == "done"
        assert single[f"{stage}:b"].address == states[f"{stage}:a"].address


def test_identities_are_of_contents(world: Path, tmp_path: Path) -> None:
    asked = recipe(world, {"embedding": str(world / "embedder")})
    sources = Sources(asked, Store(str(tmp_path)))
    assert set(sources("embedding")) == set(sources("forgetting")) == {"content"}
    pinned = {"embedding": "org/name", "embedding_revision": "a" * 40}
    named_model = Sources(recipe(world, pinned), Store(str(tmp_path)))
    assert named_model("embedding") == {"hub": "org/name", "commit": "a" * 40}
    assert named_model("teacher") == Sources(recipe(world), Store(str(tmp_path)))("teacher")


# -- what is refused -------------------------------------------------------------------------------------------


def check(world: Path, **forgetting: Any) -> None:
    check_forgetting(asked := recipe(world, forgetting), TeacherModel.of(asked.teacher, asked.chat))


def test_good_ones_pass(world: Path) -> None:
    check_forgetting(asked := recipe(world), TeacherModel.of(asked.teacher, asked.chat))
    check(world, embedding=str(world / "embedder"))
    check(world, source=str(write_rows(world / "conversations.jsonl")))


def test_texts_that_cannot_be_scored_are_named(world: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: none of its 1 rows .*the text is empty"):
        check(world, source=str(write_texts(world / "empty.jsonl", ["  "])))
    with pytest.raises(DataError, match="has no rows"):
        check(world, source=str(write_texts(world / "none.jsonl", [])))
    rows = str(write_rows(world / "conversations.jsonl"))
    with pytest.raises(DataError, match=r"row r0 of forgetting has no token to score among its first 4 .*max_tokens"):
        check(world, source=rows, max_tokens=4)
    long = str(write_texts(world / "long.jsonl", ["7", "How many apples? " * 100]))
    with pytest.raises(
        DataError, match=r"has \d+ tokens, but the teacher's context is 256 → set forgetting.max_tokens to 256"
    ):
        check(world, source=long)
    check(world, source=long, max_tokens=256)
    check(world, source=long, limit=1)
    sources = Sources(recipe(world, {"source": "/nowhere/texts.jsonl"}), Store(str(world / "store")))
    with pytest.raises(RecipeError, match=re.escape("forgetting: no file /nowhere/texts.jsonl")):
        sources("forgetting")


def test_the_seed_set_is_not_held_out(world: Path) -> None:
    with pytest.raises(DataError, match=r"forgetting\.source is the seed set"):
        check(world, source=recipe(world).seed_set.source)


def test_a_model_that_embeds_nothing_is_refused(world: Path) -> None:
    with pytest.raises(ModelError, match="which is not an encoder"):
        check(world, embedding=str(world / "teacher"))
    with pytest.raises(ModelError, match="no model directory /nowhere/embedder"):
        check(world, embedding="/nowhere/embedder")
    unpinned = Forgetting(source="texts.jsonl", embedding="nobody/nothing")
    with pytest.raises(ModelError, match=r"pin forgetting\.embedding_revision to a 40-digit commit"):
        embedding_source(unpinned)


def test_paths_start_at_the_folder_of_the_recipe(world: Path) -> None:
    data = recipe_data(world, world / "teacher", forgetting={"source": "texts.jsonl", "embedding": "./embedder"})
    found = Recipe.parse(data, base=world).forgetting
    assert found is not None
    assert (found.source, found.embedding) == (str(world / "texts.jsonl"), str(world / "embedder"))
