"""A small study on real Ray: what is trained, what is shared, the table against the scores, and running it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sdft_ray.analysis.digest import collect, merged, read_digest, unpacked, write_digest
from sdft_ray.analysis.digest_page import digest_page
from sdft_ray.cli.render_study import print_study
from sdft_ray.pipeline.study import StudyRun, plan_study, run_study
from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.study import Study
from sdft_ray.recipe.yaml_model import dump_yaml
from sdft_ray.statistics.scores import Scores
from sdft_ray.store import files
from sdft_ray.store.store import Store
from tests.support.recipes import write_rows
from tests.support.worlds import LIGHT, world_data

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
SMALL: dict[str, Any] = {"num_rows": [8], "learning_rates": [1e-3], "rates_at": None, "seeds": [0]}


@pytest.fixture(scope="module")
def folder(world: Path) -> Path:
    data = world_data(world)
    data["train"] = {**data["train"], "validation_fraction": 0.3}
    data["seed_set"] = {**data["seed_set"], "source": str(write_rows(world / "many.jsonl", 24))}
    (world / "recipe.yaml").write_text(dump_yaml(json.loads(json.dumps(data))), encoding="utf-8")
    return world


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.nightly)])
def is_whole(request: pytest.FixtureRequest) -> bool:
    return request.param == "whole"


@pytest.fixture(scope="module")
def study(folder: Path, is_whole: bool) -> Study:
    """The small one has one size, one learning rate and one seed."""
    path = folder / "study.yaml"
    path.write_text(dump_yaml(STUDY if is_whole else STUDY | SMALL), encoding="utf-8")
    return Study.load(path)


@pytest.fixture(scope="module")
def store(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of its own: what is in it is counted."""
    return Store(str(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def done(study: Study, store: Store, is_whole: bool) -> StudyRun:
    size = plan_study(study, store).size
    # Whole: 2 arms x 2 rates at one size; both sizes and seeds, of which the first seed at that size is there.
    # Small: 2 arms at the only rate, with the only size and seed.
    expected = (4, 6) if is_whole else (2, 0)
    assert (size.num_rate_trainings, size.num_seed_trainings) == expected
    assert plan_study(study, store).num_done == 0
    return run_study(study, store, RESOURCES, view="none")


def test_the_table_says_what_the_scores_say(done: StudyRun, store: Store, is_whole: bool) -> None:
    rows = done.rows.to_pylist()
    keys = {(row["remove_blocks"], row["arm"], row["num_rows"], row["seed"], row["task"]) for row in rows}
    assert len(keys) == len(rows) == 2 * (2 * 2 if is_whole else 1)
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


def test_sizes_are_nested_and_trainings_are_shared(done: StudyRun, store: Store, is_whole: bool) -> None:
    trained = store.manifests("train")
    assert len(trained) == (10 if is_whole else 2)
    sizes = {manifest.step: manifest.summary.get("num_rows") for manifest in trained}
    assert all(sizes.values())
    assert done.shared.num_made == done.shared.num_artifacts
    assert done.shared.num_steps > done.shared.num_artifacts
    assert len(store.manifests("seed")) == len(store.manifests("calibration")) == 1


def test_running_it_again_makes_nothing_and_draws_the_same(
    done: StudyRun, study: Study, folder: Path, store: Store, is_whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_study(study, store).num_done == (10 if is_whole else 2)
    again = run_study(study, store, RESOURCES, view="none")
    assert again.rows.equals(done.rows)
    assert again.shared.num_made == 0
    print_study(again, store, as_json=True)
    output = json.loads(capsys.readouterr().out)
    assert pq.read_table(output["Rows"]).equals(done.rows)
    assert Path(output["Table"]).read_text(encoding="utf-8").startswith("|  | recovery | against sft | ")
    page = Path(output["Page"]).read_text(encoding="utf-8")
    assert "tiny_study" in page
    assert str(folder) not in page
    assert Path(output["Figure"]).read_bytes().startswith(b"\x89PNG")


def test_a_digest_has_what_is_finished_once(
    done: StudyRun, study: Study, store: Store, is_whole: bool, tmp_path: Path
) -> None:
    found = collect(study, store)
    rows = {(row["arm"], row["num_rows"], row["seed"]): row for row in done.rows.to_pylist()}
    assert len(found["students"]) == len(rows) == (8 if is_whole else 2)
    assert len(found["trainings"]) == (10 if is_whole else 2)
    for key, entry in found["students"].items():
        row = rows[entry["arm"], entry["num_rows"], entry["seed"]]
        assert unpacked(found["evaluations"][key]["tasks"]["tiny_task"]["items"]) == row["items"]
        assert unpacked(found["evaluations"][entry["teacher"]]["tasks"]["tiny_task"]["items"]) == row["teacher_items"]
        assert entry["held_out_loss"] == pytest.approx(row["held_out_loss"])
    write_digest(found, tmp_path / "digest.json")
    assert merged(read_digest(tmp_path / "digest.json"), collect(study, store)) == (found, 0)
    assert "## tiny_study" in digest_page(found, "Results")
    other = Store(str(tmp_path / "other"))
    assert collect(study, other)["students"] == {}


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
