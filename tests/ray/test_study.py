"""A small study on real Ray: what is trained, what is shared, the table against the scores, and running it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sdft_ray.cli.render_study import print_study
from sdft_ray.pipeline.study import StudyRun, plan_study, run_study
from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.study import Study
from sdft_ray.recipe.yaml_model import dump_yaml
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.store import Store
from tests.support.recipes import write_rows
from tests.support.worlds import LIGHT, make_world, world_data

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.timeout(1800),  # ten trainings
]

RESOURCES = Resources.model_validate(
    {
        **LIGHT,
        "generate": {"sampler": "scripted", "cpus": 0.5},
        "train": {**LIGHT["train"], "num_workers": 1, "checkpoint_every": 100},
    }
)
STUDY: dict[str, Any] = {
    "name": "tiny_study",
    "recipe": "./recipe.yaml",
    "remove_blocks": [2],
    "arms": {
        "sft": {"data": "reference"},
        "tail": {"data": "reference", "recipe": {"depth": {"metric": "tail"}, "train": {"train_last_n_layers": 1}}},
    },
    "num_rows": [3, 8],
    "learning_rates": [1e-3, 1e30],
    "rates_at": 8,
    "seeds": [0, 1],
    "budget": {"max_trainings": 10},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    data = world_data(folder)
    data["train"] = {**data["train"], "validation_fraction": 0.3}
    data["seed_set"] = {"source": str(write_rows(folder / "many.jsonl", 24))}
    (folder / "recipe.yaml").write_text(dump_yaml(json.loads(json.dumps(data))), encoding="utf-8")
    (folder / "study.yaml").write_text(dump_yaml(STUDY), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store(str(folder / "store"))


@pytest.fixture(scope="module")
def done(folder: Path, store: Store) -> StudyRun:
    study = Study.load(folder / "study.yaml")
    plan = plan_study(study, store)
    # 2 arms x 2 rates at one size; both sizes and seeds, of which the first seed at that size is there.
    assert (plan.size.num_rate_trainings, plan.size.num_seed_trainings, plan.num_done) == (4, 6, 0)
    return run_study(study, store, RESOURCES, view="none")


def test_the_table_says_what_the_scores_say(done: StudyRun, store: Store) -> None:
    rows = done.rows.to_pylist()
    keys = {(row["remove_blocks"], row["arm"], row["num_rows"], row["seed"], row["task"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 2 * 2
    assert {row["learning_rate"] for row in rows} == {1e-3}  # the other one diverges
    assert {(row["arm"], row["metric"]) for row in rows} == {("sft", "angular_distance"), ("tail", "tail")}
    assert {(row["remove_blocks"], row["num_blocks"]) for row in rows} == {(2, 2)}
    values = sorted(row["score"] for row in rows)
    stored = []
    for manifest in store.manifests("evaluate"):
        scores = json.loads((store.path(manifest.address) / files.SCORES).read_text(encoding="utf-8"))
        stored.append(Scores.from_json(scores).tasks["tiny_task"].value)
    assert set(values) <= set(stored)
    for row in rows:
        assert row["score"] == pytest.approx(sum(row["items"]) / row["n"])
        assert row["teacher_score"] == pytest.approx(sum(row["teacher_items"]) / row["n"])


def test_sizes_are_nested_and_trainings_are_shared(done: StudyRun, store: Store) -> None:
    trained = store.manifests("train")
    assert len(trained) == 10
    sizes = {manifest.step: manifest.summary.get("num_rows") for manifest in trained}
    assert all(sizes.values())
    assert done.shared.num_made == done.shared.num_artifacts
    assert done.shared.num_steps > done.shared.num_artifacts
    assert len(store.manifests("seed")) == len(store.manifests("calibration")) == 1


def test_running_it_again_makes_nothing_and_draws_the_same(
    done: StudyRun, folder: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study.load(folder / "study.yaml")
    assert plan_study(study, store).num_done == 10
    again = run_study(study, store, RESOURCES, view="none")
    assert again.rows.equals(done.rows)
    assert again.shared.num_made == 0
    print_study(again, store, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert pq.read_table(told["Rows"]).equals(done.rows)
    assert Path(told["Table"]).read_text(encoding="utf-8").startswith("|  | recovery | against sft | ")
    page = Path(told["Page"]).read_text(encoding="utf-8")
    assert "tiny_study" in page
    assert str(folder) not in page
    assert Path(told["Figure"]).read_bytes().startswith(b"\x89PNG")


def test_two_sets_for_one_cache_are_rewritten_in_turn(folder: Path, tmp_path: Path) -> None:
    """Their rows lie in one cache, which one generation at a time may write."""
    study = STUDY | {
        "arms": {"sdft": {"data": "distilled"}},
        "variants": {
            "few": {"seed_set": {"source": str(write_rows(folder / "few.jsonl", 16))}},
            "many": {},
        },
        "num_rows": [8],
        "learning_rates": [1e-3],
        "rates_at": None,
        "seeds": [0],
    }
    (folder / "sets.yaml").write_text(dump_yaml(study), encoding="utf-8")
    slow = RESOURCES.model_copy(
        update={"generate": RESOURCES.generate.model_copy(update={"scripted_delay_s": 0.5, "cpus": 0.1})}
    )
    store = Store(str(tmp_path / "store"))
    rows = run_study(Study.load(folder / "sets.yaml"), store, slow, view="none").rows
    assert set(rows["variant"].to_pylist()) == {"few", "many"}
    assert len(store.manifests("generate")) == 2
