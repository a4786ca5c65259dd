"""What moves an address and what does not (DESIGN: identity apart from execution)."""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sdft_ray.recipe.arms import Arm, Merge, Objective
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import dump_yaml, old_name
from sdft_ray.stages.graph import State, Step, resolve, steps
from sdft_ray.stages.sources import Sources
from sdft_ray.stages.spec import VERSIONS
from sdft_ray.store.fingerprint import fingerprint
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store
from tests.support.recipes import recipe_data

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def _shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        order.shuffle(keys)
        return {key: _shuffled(value[key], order) for key in keys}
    return [_shuffled(item, order) for item in value] if isinstance(value, list) else value


@given(json_values, st.randoms(use_true_random=False))
def test_key_order_never_moves_a_fingerprint(value: Any, order: random.Random) -> None:
    assert fingerprint(_shuffled(value, order)) == fingerprint(value)


@given(json_values, json_values)
def test_different_values_have_different_fingerprints(left: Any, right: Any) -> None:
    same = json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
    assert (fingerprint(left) == fingerprint(right)) == same


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "teacher").mkdir()
    (folder / "teacher/config.json").write_text("{}", encoding="utf-8")
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny_task.yaml").write_text("task: tiny_task", encoding="utf-8")
    (folder / "other.jsonl").write_text("{}", encoding="utf-8")
    recipe_data(folder, folder / "teacher")
    return folder


def _identities(recipe: Recipe, folder: Path) -> dict[str, str]:
    """A fingerprint per step, with the plan taken as committed so that nothing waits."""
    store = Store(str(folder / "store"))
    store.check_writable()
    states: dict[str, State] = {}
    for _ in range(2):
        states = resolve(recipe, store, Sources(recipe, store))
        plan = states["plan"]
        if plan.status == "missing":
            usage = Usage()
            summary = {"plan": {"keep_blocks": [0]}}
            store.commit(Manifest("plan", "plan", plan.address, plan.fingerprint, "{}", {}, {}, usage, summary))
    return {name: state.fingerprint for name, state in states.items()}


def _base(folder: Path) -> dict[str, Any]:
    data = recipe_data(folder, folder / "teacher")
    data["evaluate"] = {**data["evaluate"], "include": str(folder / "tasks"), "tuned": ("tiny_task",)}
    data["train"] = {**data["train"], "lora": {"rank": 4}}
    data["seed_set"] = {**data["seed_set"], "columns": {"id": "id"}}
    data["generate"] = {**data.get("generate", {}), "temperature": 0.7}
    return data


def _leaves(model: type[BaseModel], data: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of the recipe, as a path; maps of arms are followed into their entries."""
    found = []
    for name, info in model.model_fields.items():
        value = data.get(name)
        inner = info.annotation
        if name == "arms":
            for arm, entry in data["arms"].items():
                found += [(*path, "arms", arm, *leaf) for leaf in _leaves(Arm, entry)]
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _leaves(inner, value or {}, (*path, name))
        else:
            found.append((*path, name))
    return found


def _changes(folder: Path) -> dict[str, Any]:
    """Another valid value for each field; the test fails when a new field has none here."""
    return {
        "name": "another", "description": "words", "replicate": 2,
        "teacher.model": str(folder / "other"), "teacher.revision": None,
        "teacher.config": str(folder / "other/config.json"),
        "teacher.dtype": "bfloat16",
        "seed_set.source": str(folder / "other.jsonl"), "seed_set.columns": {"id": "key"},
        "seed_set.answer_kind": "list", "seed_set.check": "x", "calibration.check": "x",
        "seed_set.limit": 3, "seed_set.sample": 3, "calibration.sample": 3,
        "seed_set.decontaminate.ngram": 8, "seed_set.revision": None, "calibration.revision": None,
        "calibration.source": str(folder / "other.jsonl"), "calibration.columns": {"id": "key"},
        "calibration.answer_kind": "list", "calibration.limit": 3, "calibration.max_tokens": 9,
        "depth.metric": "tail", "depth.position": "mean", "depth.remove_blocks": 2, "depth.seed": 5,
        "depth.keep_parameters": None, "depth.max_parameters": None, "depth.blocks": None,
        "depth.drop": "one", "width": {"mlp": 0.5}, "patch": {}, "target": None, "distil_from": None,
        "steps": ({"width": {"mlp": 0.5}, "arm": {"data": "reference", "learning_rate": 0.1}, "num_steps": 1},),
        "generate.template": "own_words_detailed", "generate.temperature": 0.5, "generate.top_p": 0.5,
        "generate.max_tokens": 17, "generate.seed": 7, "generate.num_samples": 2, "generate.attempt": 2,
        "gap.num_rows": 3, "gap.max_stderr": 0.1, "forgetting": {"source": str(folder / "other.jsonl")},
        "generate.top_logprobs": 4, "generate.hidden_states": True,
        "train.lora": None, "train.max_seq_len": 256, "train.global_batch_size": 3, "train.num_steps": 3,
        "train.num_epochs": None, "train.optimizer": "muon", "train.schedule": "wsd", "train.warmup_fraction": 0.3,
        "train.weight_decay": 0.1, "train.max_grad_norm": 0.5, "train.ema_decay": 0.9, "train.long_examples": "drop",
        "train.tokens_per_step": None, "train.validation_fraction": 0.25, "teacher_correction": None,
        "train.turns": "all", "chat.system": "Be brief.", "chat.template_arguments": {"enable_thinking": False},
        "chat.date": datetime.date(2026, 3, 4),
        "train.arms.sft.data": "distilled", "train.arms.sft.learning_rate": 0.2, "train.arms.sft.seed": 3,
        "train.arms.sdft.data": "reference", "train.arms.sdft.learning_rate": 0.2, "train.arms.sdft.seed": 3,
        **{
            f"train.arms.{arm}.objective.{field}": 0.25
            for arm in ("sft", "sdft") for field in Objective.model_fields
        },
        **{f"train.arms.{arm}.objective.teacher_logits": None for arm in ("sft", "sdft")},
        **{f"train.arms.{arm}.num_rows": 2 for arm in ("sft", "sdft")},
        "train.train_last_n_layers": None, "merges": {"both": {"arms": ("sft", "sdft")}},
        "evaluate.tasks": ({"name": "tiny_task", "num_fewshot": 1},), "evaluate.include": None, "evaluate.limit": 7,
        "evaluate.data": str(folder / "data sets"),
        "evaluate.apply_chat_template": False, "evaluate.tuned": (), "evaluate.seed": 4,
        "evaluate.samples": {"num": 4}, "release": {"min_recovery": 0.5},
        "gates": str(folder / "other.jsonl"),
        "speed.batch_rows": 3, "speed.prompt_tokens": 3, "speed.new_tokens": 3, "speed.rounds": 3,
    }  # fmt: skip


_UNSET_HERE = {
    "teacher.revision", "seed_set.revision", "calibration.revision",  # a file's identity is its content
    "depth.keep_parameters", "depth.max_parameters", "depth.blocks", "train.num_epochs",  # exclude each other
    "train.train_last_n_layers",  # or lora
    "train.tokens_per_step",  # or global_batch_size
    *(f"train.arms.{arm}.objective.top_k_kl" for arm in ("sft", "sdft")),  # below
    *(f"train.arms.{arm}.objective.teacher_logits" for arm in ("sft", "sdft")),  # below
    "target",  # wants an amount that is open: see below
    "distil_from",  # wants steps: see below
    "teacher_correction",  # wants an arm with a teacher: see tests/unit/pipeline/test_grid.py
}  # fmt: skip


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**data, path[0]: value}
    return {**data, path[0]: _set(data.get(path[0], {}), path[1:], value)}


def test_every_field_moves_some_address(world: Path) -> None:
    data = _base(world)
    before = _identities(Recipe.parse(data), world)
    changes = _changes(world)
    leaves = [".".join(path) for path in _leaves(Recipe, data)]
    assert set(leaves) == set(changes), "give every field of the recipe another value above"
    for leaf in sorted(set(leaves) - _UNSET_HERE):
        after = _identities(Recipe.parse(_set(data, tuple(leaf.split(".")), changes[leaf])), world)
        assert after != before, f"{leaf} changes no address"


def test_alternative_targets_move_addresses(world: Path) -> None:
    seen = []
    for depth in (
        {"remove_blocks": 1}, {"keep_parameters": 0.5}, {"max_parameters": 100}, {"metric": "explicit", "blocks": (1,)},
    ):  # fmt: skip
        seen.append(_identities(Recipe.parse({**_base(world), "depth": depth}), world)["plan"])
    assert len(set(seen)) == 4


def test_widths_move_the_plan_and_only_asking_for_channels_the_measurement(world: Path) -> None:
    found = [
        _identities(Recipe.parse({**_base(world), "width": width}), world)
        for width in (None, {"mlp": 0.5}, {"mlp": 0.6}, {"hidden": 0.5}, {"mlp": 0.5, "over_tokens": "l2"})
    ]
    assert len({identities["plan"] for identities in found}) == len(found)
    assert len({identities["measure"] for identities in found}) == 2


def test_a_target_moves_what_reads_it(world: Path) -> None:
    def identities(target: dict[str, Any], **more: Any) -> dict[str, str]:
        depth = {"remove_blocks": "target"}
        return _identities(Recipe.parse({**_base(world), "depth": depth, "target": target, **more}), world)

    targets: list[dict[str, Any]] = [
        {"parameters": 0.8}, {"parameters": 0.7}, {"memory_bytes": 0.8}, {"memory_bytes": 0.8, "context_tokens": 99},
        {"speedup": 1.5}, {"speedup": 1.6}, {"tokens_per_s": 100.0},
    ]  # fmt: skip
    found = [identities(target) for target in targets]
    assert len({ids["plan"] for ids in found if "rate" not in ids}) == 4
    assert len({ids["rate"] for ids in found if "rate" in ids}) == 3
    assert len({ids["measure"] for ids in found}) == 1
    assert identities({"speedup": 1.5}, speed={"rounds": 2})["rate"] != found[4]["rate"]


def test_an_earlier_step_moves_what_comes_after_it_and_nothing_else(world: Path) -> None:
    def identities(distil_from: str = "original", **step: Any) -> dict[str, str]:
        arm = {"data": "distilled", "learning_rate": 0.1, "objective": {"forward_kl": 1.0}}
        first = {"depth": {"remove_blocks": 1}, "arm": arm, "num_steps": 1, **step}
        data = _base(world)
        arms = {"kd": {**arm, "learning_rate": 0.2}}
        data["train"] = {**data["train"], "arms": arms}
        recipe = Recipe.parse({**data, "steps": (first,), "distil_from": distil_from})
        return {step.name: _identity(step, recipe, world) for step in steps(recipe)}

    before = identities()
    for changed in (identities(num_steps=2), identities(arm={"data": "reference", "learning_rate": 0.1})):
        same = {name for name in before if before[name] == changed[name]}
        assert same >= {"seed", "calibration", "measure:step1", "plan:step1", "prune:step1", "generate", "select"}
        assert not same & {"train:step1", "measure", "plan", "prune", "train:kd", "evaluate:kd"}
    previous = identities("previous")
    assert {name for name in before if before[name] != previous[name]} == {"train:kd", "evaluate:kd", "report"}


def _identity(step: Step, recipe: Recipe, folder: Path) -> str:
    """What a step counts as when its inputs count as their names' own identities, all the way up."""
    by_name = {other.name: other for other in steps(recipe)}
    inputs = {role: _identity(by_name[name], recipe, folder) for role, name in step.inputs.items()}
    sources = {name: Sources(recipe, Store(str(folder / "store")))(name) for name in step.sources}
    return fingerprint({"stage": step.stage, "recipe": step.slice, "inputs": inputs, "sources": sources})


def test_steps_counted_in_tokens_are_steps_of_their_own(world: Path) -> None:
    data = _base(world)
    data["train"] = {name: value for name, value in data["train"].items() if name != "global_batch_size"}
    before = _identities(Recipe.parse(data), world)
    data["train"]["tokens_per_step"] = 32 * 128
    assert _identities(Recipe.parse(data), world)["train:sft"] != before["train:sft"]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_key_order_and_spelt_out_defaults_move_nothing(world: Path, order: random.Random) -> None:
    recipe = Recipe.parse(_base(world))
    full = recipe.model_dump(mode="python")
    assert _identities(Recipe.parse(_shuffled(full, order)), world) == _identities(recipe, world)


def test_a_changed_depth_keeps_the_generated_set(world: Path) -> None:
    data = _base(world)
    before = _identities(Recipe.parse(data), world)
    after = _identities(Recipe.parse({**data, "depth": {"remove_blocks": 2}}), world)
    same = {name for name in before if before[name] == after[name]}
    assert same >= {"seed", "calibration", "measure", "generate", "select", "evaluate:teacher"}
    assert before["plan"] != after["plan"]


def test_the_seed_set_depends_on_which_tasks_are_asked_and_on_nothing_else_of_the_evaluation(world: Path) -> None:
    data = _base(world)
    before = _identities(Recipe.parse(data), world)
    (world / "more").mkdir(exist_ok=True)
    (world / "more/tiny_task.yaml").write_text("task: tiny_task  # changed", encoding="utf-8")
    changes = {
        "tasks": ({"name": "tiny_task", "num_fewshot": 1, "metric": "acc"},), "limit": 7, "seed": 4, "tuned": (),
        "apply_chat_template": False, "include": str(world / "more"),
    }  # fmt: skip
    for name, value in changes.items():
        evaluate = {**data["evaluate"], name: value}
        after = _identities(Recipe.parse({**data, "evaluate": evaluate}), world)
        assert (after["seed"] == before["seed"]) == (name != "include"), name
        off = [
            _identities(Recipe.parse({**data, "evaluate": asked, "seed_set": _unchecked(data)}), world)["seed"]
            for asked in (data["evaluate"], evaluate)
        ]
        assert off[0] == off[1] != before["seed"]
    other = {**data["evaluate"], "tasks": ({"name": "other"}, {"name": "tiny_task"})}
    turned = {**data["evaluate"], "tasks": ({"name": "tiny_task"}, {"name": "other"})}
    found = [_identities(Recipe.parse({**data, "evaluate": asked}), world)["seed"] for asked in (other, turned)]
    assert found[0] == found[1] != before["seed"]


def _unchecked(data: dict[str, Any]) -> dict[str, Any]:
    return {**data["seed_set"], "decontaminate": {"ngram": 0}}


def test_what_is_tuned_moves_the_student(world: Path) -> None:
    data = _base(world)
    seen = [
        _identities(Recipe.parse({**data, "train": {**data["train"], **tuned}}), world)["train:sft"]
        for tuned in (
            {},
            {"lora": None},
            {"lora": None, "train_last_n_layers": 1},
            {"lora": None, "train_last_n_layers": 0},
        )
    ]
    assert len(set(seen)) == 4


def test_cached_signals_tie_a_student_to_their_generation_and_no_other_student(world: Path) -> None:
    data = _base(world)
    objectives: dict[str, dict[str, Any]] = {
        "plain": {},
        "online": {"forward_kl": 1.0},
        "cached": {"forward_kl": 1.0, "teacher_logits": "cached"},
        "top": {"top_k_kl": 1.0},
        "less": {"top_k_kl": 0.5},
    }
    arms = {
        name: {"data": "distilled", "learning_rate": 1e-3, "objective": objective}
        for name, objective in objectives.items()
    }
    data["train"] = {**data["train"], "arms": arms}
    data["generate"] = {**data["generate"], "top_logprobs": 4, "hidden_states": True}
    recipe = Recipe.parse(data)
    ids = _identities(recipe, world)
    assert len({ids[f"train:{name}"] for name in arms}) == len(arms)
    reading = {step.label for step in steps(recipe) if step.stage == "train" and "generate" in step.inputs}
    assert reading == {"cached", "top", "less"}


def test_a_merge_depends_on_its_students_and_on_where_between_them(world: Path) -> None:
    data = _base(world)

    def merged(**merge: Any) -> str:
        asked = {"both": {"arms": ("sft", "sdft"), **merge}}
        return _identities(Recipe.parse({**data, "merges": asked}), world)["merge:both"]

    changed = [merged(), merged(t=(0.4,)), merged(kind="linear"), merged(arms=("sdft", "sft"))]
    assert len(set(changed)) == 4
    data["train"] = {**data["train"], "max_grad_norm": 0.5}
    assert merged() not in changed


def test_other_turns_are_another_seed_set_and_all_that_reads_it(world: Path) -> None:
    data = _base(world)
    before = _identities(Recipe.parse(data), world)
    after = _identities(Recipe.parse({**data, "train": {**data["train"], "turns": "all"}}), world)
    assert {"seed", "generate", "select", "train:sft"} <= {name for name in before if before[name] != after[name]}
    assert before["measure"] == after["measure"]
    same = _identities(Recipe.parse({**data, "train": {**data["train"], "turns": "last"}}), world)
    assert same == before


def test_arms_share_what_they_can(world: Path) -> None:
    data = _base(world)
    arm = {"data": "reference", "learning_rate": 1e-3}
    data["train"] = {**data["train"], "arms": {"a": arm, "b": arm}}
    ids = _identities(Recipe.parse(data), world)
    assert ids["train:a"] == ids["train:b"]
    assert ids["evaluate:a"] == ids["evaluate:b"]


def test_resources_have_no_way_into_a_step(world: Path) -> None:
    from sdft_ray.recipe.resources import Resources

    names = {name for name, info in Resources.model_fields.items() if not hasattr(info.annotation, "model_fields")}
    text = json.dumps([step.slice for step in steps(Recipe.parse(_base(world)))])
    assert not [name for name in names if f'"{name}"' in text]


def test_golden_fingerprints(world: Path) -> None:
    """A default that changes, or a stage without a raised VERSION, would silently reuse old results."""
    data = _base(world)
    slices = {step.name: step.slice for step in steps(Recipe.parse(data))}
    entries = {"arm": _defaults(Arm), "merge": _defaults(Merge)}
    found = {"versions": VERSIONS, "slices": slices, "defaults": {**_defaults(Recipe), **entries}}
    golden = Path(__file__).with_name("golden_identity.yaml")
    assert dump_yaml(json.loads(json.dumps(found))) == golden.read_text(encoding="utf-8"), (
        "identity changed: raise VERSIONS of the stages concerned, then rewrite the golden file"
    )


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, info in model.model_fields.items():
        inner, name = info.annotation, old_name(model, field)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found[name] = _defaults(inner)
        else:
            found[name] = "required" if info.is_required() else json.loads(json.dumps(info.default, default=str))
    return found
