"""What task files read, wherever it lies, and where a folder of data sets holds the data of lm-eval's own tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.task_data import hub_data
from sdft_ray.evaluation.task_inputs import TaskInputs, task_inputs
from sdft_ray.evaluation.task_plans import TaskPlaces, tasks_of
from sdft_ray.evaluation.tasks import check_tasks, leaf_tasks, load_tasks, task_questions

ROWS = [{"question": f"How many are {i} and 2?", "answer": str(i + 2)} for i in range(4)]
BASE: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write(path: Path, content: Any = None) -> Path:
    """Rows as JSON lines, a mapping as YAML, a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, dict):
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content or ROWS), encoding="utf-8")
    return path


def task(name: str, files: Any, **changes: Any) -> dict[str, Any]:
    return {**BASE, "task": name, "dataset_kwargs": {"data_files": files}, **changes}


def read(folder: Path, *names: str, **places: Any) -> TaskInputs:
    return task_inputs(dict.fromkeys(names), TaskPlaces(folder / "tasks", **places))


def num_docs(folder: Path, name: str, **places: Any) -> int:
    loaded = load_tasks([name], TaskPlaces(folder / "tasks", **places))
    return sum(len(leaf.eval_docs) for leaf in leaf_tasks(loaded[name]))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"test": "inside.jsonl"}, []),
        ({"test": "../outside.jsonl"}, ["outside.jsonl"]),
        ({"test": ["inside.jsonl", "../more/a.jsonl", "../more/b.jsonl"]}, ["a.jsonl", "b.jsonl"]),
        ({"test": "../more/*.jsonl"}, ["a.jsonl", "b.jsonl"]),
        ({"test": "{root}/outside.jsonl"}, ["outside.jsonl"]),
        ({"test": "below/cwd.jsonl"}, ["cwd.jsonl"]),
    ],
)
def test_data_files_wherever_they_lie(tmp_path: Path, files: dict[str, Any], expected: list[str]) -> None:
    for place in ("tasks/inside", "outside", "more/a", "more/b", "work/below/cwd"):
        write(tmp_path / f"{place}.jsonl")
    write(tmp_path / "tasks/t.yaml", task("t", json.loads(json.dumps(files).replace("{root}", str(tmp_path)))))
    found = read(tmp_path, "t", working_dir=tmp_path / "work")
    assert [path.name for path in found.outside] == expected
    num_files = len(expected) + ("inside.jsonl" in files["test"])
    assert num_docs(tmp_path, "t", working_dir=tmp_path / "work") == len(ROWS) * num_files


def test_a_folder_of_data(tmp_path: Path) -> None:
    write(tmp_path / "data/test.jsonl")
    write(tmp_path / "tasks/t.yaml", {**BASE, "task": "t", "dataset_kwargs": {"data_dir": "../data"}})
    write(tmp_path / "tasks/u.yaml", {**BASE, "task": "u", "dataset_path": "../data"})
    for name in ("t", "u"):
        assert [path.name for path in read(tmp_path, name).outside] == ["test.jsonl"]
        assert num_docs(tmp_path, name) == len(ROWS)


def test_includes_start_at_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path / "shared/rows/x.jsonl")
    write(tmp_path / "shared/base.yaml", {**BASE, "dataset_kwargs": {"data_files": {"test": "rows/x.jsonl"}}})
    write(tmp_path / "tasks/middle.txt", {"include": "../shared/base.yaml", "doc_to_text": "Q: {{question}}"})
    write(tmp_path / "tasks/deep/er/t.yaml", {"include": ["../../middle.txt"], "task": "t"})
    assert [path.name for path in read(tmp_path, "t").outside] == ["base.yaml", "x.jsonl"]
    leaf = leaf_tasks(load_tasks(["t"], TaskPlaces(tmp_path / "tasks"))["t"])[0]
    assert leaf.doc_to_text(leaf.eval_docs[0]) == f"Q: {ROWS[0]['question']}"
    assert num_docs(tmp_path, "t") == len(ROWS)


def test_functions_with_what_their_modules_read(tmp_path: Path) -> None:
    """Two folders may have a module of one name; each task gets its own."""
    for number in (1, 2):
        place = tmp_path / str(number)
        write(place / "lib/shared.py", f"NUMBER = {number}\n")
        write(place / "lib/words.txt", "a b")
        helper = "from pathlib import Path\nfrom shared import NUMBER\nWORDS = Path(__file__).parent / 'words.txt'\n"
        helper += "def text(doc):\n    return f'{NUMBER} {WORDS.read_text()}'\n"
        write(place / "lib/helper.py", helper)
        write(place / "lib/base.yaml", "doc_to_text: !function helper.text\n")
        own = {key: value for key, value in task("t", {"test": "x.jsonl"}).items() if key != "doc_to_text"}
        write(place / "tasks/t.yaml", {**own, "include": "../lib/base.yaml"})
        write(place / "tasks/x.jsonl")
        assert [path.name for path in read(place, "t").outside] == [
            "base.yaml",
            "helper.py",
            "shared.py",
            "words.txt",
        ]
        asked = list(task_questions(["t"], TaskPlaces(place / "tasks")))
        assert asked[0][-1] == f"{number} a b"


def test_only_tasks_asked_for_are_read(tmp_path: Path) -> None:
    write(tmp_path / "tasks/x.jsonl")
    write(tmp_path / "tasks/good.yaml", task("good", {"test": "x.jsonl"}))
    write(tmp_path / "tasks/bad.yaml", "task: bad\nmetric_list: [unclosed")
    write(tmp_path / "tasks/lost.yaml", {"include": "nowhere.yaml", "task": "lost"})
    write(tmp_path / "tasks/data.yaml", task("data", {"test": "nowhere.jsonl"}))
    write(tmp_path / "tasks/split.yaml", task("split", {"train": "x.jsonl"}))
    check_tasks(["good"], TaskPlaces(tmp_path / "tasks"), {}, {})
    for name, message in (
        ("bad", "bad.yaml cannot be read"),
        ("lost", "lost.yaml cannot be read: .*nowhere.yaml"),
        ("split", "task 'split' cannot be loaded: there is no split or column 'test'"),
        ("data", "data.yaml: data file nowhere.jsonl does not exist"),
    ):
        with pytest.raises(EvaluationError, match=message):
            check_tasks([name], TaskPlaces(tmp_path / "tasks"), {}, {})


def test_a_task_goes_by_its_name_and_not_its_files(tmp_path: Path) -> None:
    write(tmp_path / "tasks/x.jsonl")
    write(tmp_path / "tasks/stem.yaml", task("real", {"test": "x.jsonl"}))
    places = TaskPlaces(tmp_path / "tasks")
    check_tasks(["real"], places, {}, {})
    with pytest.raises(EvaluationError, match=r"no task named 'stem': .*stem.yaml defines 'real'"):
        check_tasks(["stem"], places, {}, {})
    with pytest.raises(EvaluationError, match="no task named 'reel'") as caught:
        check_tasks(["reel"], places, {}, {})
    assert "real" in caught.value.hint
    write(tmp_path / "tasks/twin.yaml", task("real", {"test": "x.jsonl"}))
    with pytest.raises(EvaluationError, match="both define 'real'"):
        check_tasks(["real"], places, {}, {})


def test_groups_and_tags_as_lm_eval_reads_them(tmp_path: Path) -> None:
    """Against lm-eval's own task manager."""
    from lm_eval.tasks import TaskManager

    files = {"test": str(write(tmp_path / "x.jsonl"))}
    for name in "abcd":
        write(tmp_path / f"tasks/{name}.yaml", task(name, files, **({"tag": "some"} if name in "ab" else {})))
    inner = {"group": "inner", "task": ["b", {"task": "c", "num_fewshot": 2}], "num_fewshot": 1}
    write(tmp_path / "tasks/inner.yaml", inner)
    outer = [{"task": "d", "description": "D"}, "inner", {"group": "new", "task": ["a"]}]
    metrics = [{"metric": "exact_match", "weight_by_size": True}]
    write(tmp_path / "tasks/outer.yaml", {"group": "outer", "task": outer, "aggregate_metric_list": metrics})
    theirs = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    for name in ("outer", "inner", "some", "a"):
        mine = load_tasks([name], TaskPlaces(tmp_path / "tasks"))[name]
        found = theirs.load([name])
        settings = {leaf.task_name: (leaf.config.num_fewshot, leaf.config.description) for leaf in leaf_tasks(mine)}
        assert settings == {
            key: (leaf.config.num_fewshot, leaf.config.description) for key, leaf in found["tasks"].items()
        }
    with pytest.raises(EvaluationError, match="'b' is asked for twice, by 'some' and by 'b'"):
        check_tasks(["some", "b"], TaskPlaces(tmp_path / "tasks"), {}, {})


@pytest.mark.slow
def test_names_of_lm_eval_stand_for_what_its_task_manager_says() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    library = TaskPlaces().library()
    for name in ("mmlu", "ai2_arc", "leaderboard_gpqa", "truthfulqa", "minerva_math", "super-glue-lm-eval-v1"):
        plans = library.plans([name])[name]
        wanted: set[str] = set()
        left = [name]
        while left:
            entry = manager.task_index[left.pop()]
            if entry.kind.name == "TAG":
                wanted |= entry.tags
            elif entry.kind.name == "GROUP":
                left += [part if isinstance(part, str) else part["task"] for part in (entry.cfg or {})["task"]]
            else:
                wanted.add(entry.name)
        assert {plan.name for plan in tasks_of(plans)} == wanted


# --- a folder of data sets ------------------------------------------------------------------------------------------

ARC = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B", "id": "1"}
MMLU = [
    {"question": f"{subject}?", "subject": subject, "choices": list("abcd"), "answer": 1}
    for subject in ("virology", "sociology")
    for _ in range(3)
]


@pytest.mark.parametrize(
    "place", ["allenai/ai2_arc/ARC-Challenge", "ai2_arc/arc_challenge", "ARC-Challenge", "arc_challenge"]
)
def test_layouts_of_a_data_set(tmp_path: Path, place: str) -> None:
    write(tmp_path / place / "test.jsonl", [ARC] * 3)
    places = TaskPlaces(data=tmp_path)
    loaded = load_tasks(["arc_challenge"], places, {"arc_challenge": 0})["arc_challenge"]
    assert len(leaf_tasks(loaded)[0].eval_docs) == 3
    assert [path.name for path in task_inputs({"arc_challenge": 0}, places).data] == ["test.jsonl"]
    with pytest.raises(
        EvaluationError, match="'arc_challenge' needs the split 'train' of allenai/ai2_arc for few-shot"
    ):
        check_tasks(["arc_challenge"], places, {"arc_challenge": 2}, {})
    write(tmp_path / place / "train-00000-of-00002.jsonl", [ARC])
    write(tmp_path / place / "train-00001-of-00002.jsonl", [ARC])
    check_tasks(["arc_challenge"], places, {"arc_challenge": 2}, {"arc_challenge": "acc_norm"})
    with pytest.raises(EvaluationError, match="has no metric 'bleu'"):
        check_tasks(["arc_challenge"], places, {"arc_challenge": 2}, {"arc_challenge": "bleu"})


def test_a_data_set_in_one_file_is_told_apart_by_a_column_or_refused(tmp_path: Path) -> None:
    """Files of all configurations in the data set's own folder could be of any."""
    write(tmp_path / "ai2_arc/test.jsonl", [ARC])
    places = TaskPlaces(data=tmp_path)
    with pytest.raises(EvaluationError, match=r"reads the data set allenai/ai2_arc/ARC-Easy, which .* does not hold"):
        check_tasks(["arc_easy"], places, {"arc_easy": 0}, {})
    for split in ("dev", "test"):
        write(tmp_path / f"cais/mmlu/{split}.jsonl", MMLU)
    loaded: Any = leaf_tasks(load_tasks(["mmlu_virology"], places, {"mmlu_virology": 1})["mmlu_virology"])[0]
    assert [doc["question"] for doc in loaded.eval_docs] == ["virology?"] * 3
    assert {doc["subject"] for doc in loaded.fewshot_docs()} == {"virology"}
    with pytest.raises(EvaluationError, match="cais/mmlu/abstract_algebra"):
        check_tasks(["mmlu"], places, {}, {})


def test_a_split_in_two_forms_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "arc_challenge/test.jsonl", [ARC])
    write(tmp_path / "arc_challenge/test.json", [ARC])
    with pytest.raises(EvaluationError, match=r"holds the split 'test' as test.json and as test.jsonl"):
        check_tasks(["arc_challenge"], TaskPlaces(data=tmp_path), {"arc_challenge": 0}, {})
    with pytest.raises(EvaluationError, match=r"the data folder .*nowhere does not exist"):
        check_tasks(["arc_challenge"], TaskPlaces(data=tmp_path / "nowhere"), {"arc_challenge": 0}, {})
    plan = next(tasks_of(TaskPlaces().library().plans(["squadv2"])["squadv2"]))
    with pytest.raises(EvaluationError, match="by code of its own"):
        hub_data(plan, tmp_path, 0)
