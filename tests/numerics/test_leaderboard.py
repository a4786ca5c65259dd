"""The leaderboard's six tasks by the harness's own task files, on made data of their shape, against plain lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from sdft_ray.evaluation.harness import Result
from sdft_ray.recipe.suites import SUITES
from tests.support.asking import result_of
from tests.support.tiny import make_model

pytestmark = pytest.mark.slow

NAMES = ("Ann", "Tom", "Eve", "Bob", "Ida", "Max", "Sue")
SUITE = SUITES["open-llm-leaderboard-v1"]
TASKS = [{**task, "name": "few_of_mmlu"} if task["name"] == "mmlu" else task for task in SUITE["tasks"]]
"""The suite's tasks, with a group of a few subjects in place of MMLU's 57."""
FEW_SUBJECTS = ("abstract_algebra", "high_school_european_history", "virology")
ALL_OF_MMLU = next(task for task in SUITE["tasks"] if task["name"] == "mmlu")
Rows = list[dict[str, Any]]


def _arc(i: int) -> dict[str, Any]:
    labels = list("ABCDE")[: 3 + i % 3]
    options = {"text": [f"{i + k} {NAMES[k]}s" for k in range(len(labels))], "label": labels}
    return {"id": str(i), "question": f"How many is {i}?", "choices": options, "answerKey": labels[i % len(labels)]}


def _hellaswag(i: int) -> dict[str, Any]:
    endings = [f"{name} takes [step] {i + k} apples." for k, name in enumerate(NAMES[:4])]
    context = {"activity_label": "Sums", "ctx_a": f"{NAMES[i % 7]} counts.", "ctx_b": "then"}
    return {**context, "endings": endings, "label": str(i % 4)}


def _mmlu(i: int) -> dict[str, Any]:
    return {"question": f" What is {i} + 1? ", "choices": [str(i + k) for k in range(4)], "answer": i % 4}


def _truthful(i: int) -> dict[str, Any]:
    options = {"choices": [f"{name} is {i}." for name in NAMES[: 4 + i % 3]], "labels": [1, 1, *[0] * (2 + i % 3)]}
    return {"question": f"Who is {i}?", "mc1_targets": options, "mc2_targets": options}


def _winogrande(i: int) -> dict[str, Any]:
    pair = {"option1": NAMES[i % 7], "option2": NAMES[(i + 3) % 7]}
    return {"sentence": f"Tom gave Ann {i} figs, so _ has fewer figs than {i + 5}.", **pair, "answer": str(1 + i % 2)}


def _gsm8k(i: int) -> dict[str, Any]:
    return {"question": f"Tom has {i} apples and gets 2. How many?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}


Make = Callable[[int], dict[str, Any]]
SETS: dict[str, tuple[str, Make, tuple[str, ...]]] = {
    "allenai/ai2_arc": ("ARC-Challenge", _arc, ("train", "validation", "test")),
    "Rowan/hellaswag": ("default", _hellaswag, ("train", "validation")),
    "truthfulqa/truthful_qa": ("multiple_choice", _truthful, ("validation",)),
    "allenai/winogrande": ("winogrande_xl", _winogrande, ("train", "validation")),
    "openai/gsm8k": ("main", _gsm8k, ("train", "test")),
}


def _rows(make: Make, split: str, num: int, *, start: int = 0) -> Rows:
    start += 1000 if split in {"train", "dev"} else 0
    return [make(start + i) for i in range(num)]


def _write_set(folder: Path, splits: dict[tuple[str, str], Rows]) -> None:
    """A data set as on the hub: a file for each configuration and split, and a README that names them."""
    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), rows in splits.items():
        path = folder / config / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}.jsonl"})
    named = [{"config_name": config, "data_files": files} for config, files in configs.items()]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': named})}---\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders called as the hub's data sets: `datasets` looks there before it asks the hub."""
    folder = tmp_path_factory.mktemp("hub")
    for name, (config, make, splits) in SETS.items():
        _write_set(
            folder / name, {(config, split): _rows(make, split, 30 if split == "train" else 10) for split in splits}
        )
    files = sorted((Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"))
    subjects = {path.stem.removeprefix("mmlu_"): 5 * number for number, path in enumerate(files)}
    sizes = {"dev": 5, "test": 2}
    cells = product(subjects.items(), sizes.items())
    mmlu = {(subject, split): _rows(_mmlu, split, num, start=start) for (subject, start), (split, num) in cells}
    _write_set(folder / "cais/mmlu", mmlu)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the group of a few subjects, in the form of the harness's own group of all."""
    folder = tmp_path_factory.mktemp("groups")
    group = {
        "group": "few_of_mmlu",
        "task": [f"mmlu_{subject}" for subject in FEW_SUBJECTS],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (folder / "few_of_mmlu.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


def evaluated(tasks: list[dict[str, Any]], checkpoint: Path, **options: Any) -> Result:
    return result_of(
        checkpoint,
        [task["name"] for task in tasks],
        num_fewshot={task["name"]: task["num_fewshot"] for task in tasks},
        metrics={task["name"]: task["metric"] for task in tasks},
        apply_chat_template=SUITE["apply_chat_template"],
        **options,
    )


@pytest.fixture(scope="module")
def result(data: None, checkpoint: Path, groups: Path) -> Result:
    return evaluated(TASKS, checkpoint, include=groups)


@pytest.fixture(scope="module")
def manager(groups: Path) -> TaskManager:
    return TaskManager(include_path=str(groups))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["name"])
def test_as_plain_lm_eval(task: dict[str, Any], result: Result, checkpoint: Path, manager: TaskManager) -> None:
    check_as_plain_lm_eval(task, result, checkpoint, manager)


@pytest.mark.nightly
def test_all_subjects_of_mmlu_as_plain_lm_eval(data: None, checkpoint: Path, manager: TaskManager) -> None:
    result = evaluated([ALL_OF_MMLU], checkpoint)
    check_as_plain_lm_eval(ALL_OF_MMLU, result, checkpoint, manager)
    score = result.scores.tasks["mmlu"]
    assert 0 < score.value < 1
    assert score.chance == 0.25
    assert score.n == 2 * 57


def check_as_plain_lm_eval(task: dict[str, Any], result: Result, checkpoint: Path, manager: TaskManager) -> None:
    name, (metric, _, filtered_by) = task["name"], task["metric"].partition(",")
    filtered_by = filtered_by or "none"
    run: Any = lm_eval.simple_evaluate
    plain = run(
        model="hf",
        model_args=f"pretrained={checkpoint},dtype=float32",
        tasks=[name],
        num_fewshot=task["num_fewshot"],
        task_manager=manager,
        batch_size=1,
        device="cpu",
        fewshot_random_seed=0,
    )
    score = result.scores.tasks[name]
    assert (score.metric, score.filter, score.num_fewshot) == (metric, filtered_by, task["num_fewshot"])
    assert score.num_truncated == 0
    assert score.value == pytest.approx(plain["results"][name][f"{metric},{filtered_by}"], abs=1e-6)
    assert score.stderr == pytest.approx(plain["results"][name][f"{metric}_stderr,{filtered_by}"], abs=1e-6)
    leaves = {key: rows for key, rows in plain["samples"].items() if rows}
    theirs = {
        f"{leaf}/{row['doc_id']}" if len(leaves) > 1 else str(row["doc_id"]): row
        for leaf, rows in leaves.items()
        for row in rows
        if row["filter"] == filtered_by
    }
    mine = {row["item"]: row for row in result.items if row["task"] == name}
    assert mine.keys() == theirs.keys() == score.items.keys()
    for item, row in theirs.items():
        assert mine[item]["value"] == score.items[item] == pytest.approx(row[metric], abs=1e-6)
        assert name != "gsm8k" or mine[item]["response"] == row["resps"][0][0]


def test_the_made_data_tells_right_from_wrong(result: Result) -> None:
    """But for sums, which nobody with random weights writes."""
    scores = result.scores.tasks
    values = {name: score.value for name, score in scores.items() if name != "gsm8k"}
    assert all(0 < value < 1 for value in values.values()), values
    chances = {"hellaswag": 0.25, "few_of_mmlu": 0.25, "truthfulqa_mc2": None, "winogrande": 0.5, "gsm8k": 0.0}
    assert {name: scores[name].chance for name in chances} == chances
    assert scores["few_of_mmlu"].n == 2 * len(FEW_SUBJECTS)
