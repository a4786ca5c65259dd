"""lm-eval with its own `hf` model on one leaderboard task whose data lies in files: likelihoods and scores of items.

    python jobs/bench/peers/lm_eval_leaderboard.py JOB.json

Stands alone: it uses lm-eval and nothing of `sdft_ray`. It writes task files that include lm-eval's own and name the
local files, one for each subject of MMLU, whose rows it sorts out itself. The job holds `model`, `data`, `task`,
`num_fewshot`, `limit`. The last line is one JSON object with `items`: `task/number` -> filter, metrics, answers.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

OWN = Path(lm_eval.__file__).parent / "tasks"
FILES = {
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", ("train", "validation", "test")),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", ("validation",)),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa_mc", ("validation",)),
    "winogrande": ("winogrande/default.yaml", "winogrande_xl", ("train", "validation")),
    "gsm8k": ("gsm8k/gsm8k.yaml", "gsm8k", ("train", "test")),
}
"""Task -> lm-eval's own file, the folder of the data set, its splits."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"items": measure(job, Path(folder))}))


def measure(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = write_tasks(job["task"], Path(job["data"]), folder)
    hf: Any = HFLM
    model = hf(pretrained=job["model"], dtype="float32", batch_size=16, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    run: Any = lm_eval.simple_evaluate
    results = run(
        model=model,
        tasks=names,
        num_fewshot=job["num_fewshot"],
        limit=job["limit"],
        task_manager=manager,
        bootstrap_iters=0,
        fewshot_random_seed=0,
    )
    return {
        f"{name}/{row['doc_id']}|{row['filter']}": _values(row)
        for name, rows in results["samples"].items()
        for row in rows
    }


def _values(row: dict[str, Any]) -> dict[str, Any]:
    written = isinstance(row["resps"][0][0], str)
    answers = [answer[0] if written else answer[0][0] for answer in row["resps"]]
    return {"filter": row["filter"], "metrics": {name: float(row[name]) for name in row["metrics"]}, "answers": answers}


def write_tasks(task: str, data: Path, folder: Path) -> list[str]:
    """Task files into `folder`; the names that they define."""
    if task == "mmlu":
        return write_mmlu(data / "mmlu", folder)
    own, place, splits = FILES[task]
    changes: dict[str, Any] = {"training_split": None} if task == "hellaswag" else {}
    write_task(folder, task, OWN / own, {split: file_of(data / place, split) for split in splits}, changes)
    return [task]


def write_mmlu(data: Path, folder: Path) -> list[str]:
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split in ("dev", "test"):
        path = Path(file_of(data, split))
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                rows[json.loads(line)["subject"]][split].append(line)
    for subject, splits in rows.items():
        files = {}
        for split, lines in splits.items():
            files[split] = str(folder / f"{subject}_{split}.jsonl")
            Path(files[split]).write_text("".join(lines), encoding="utf-8")
        write_task(folder, f"mmlu_{subject}", OWN / "mmlu" / "default" / f"mmlu_{subject}.yaml", files, {})
    return [f"mmlu_{subject}" for subject in sorted(rows)]


def write_task(folder: Path, name: str, own: Path, files: dict[str, str], changes: dict[str, Any]) -> None:
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    content = {"include": str(own), "task": name, **data, **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def file_of(folder: Path, split: str) -> str:
    return str(next(path for path in sorted(folder.iterdir()) if path.name in {f"{split}.jsonl", f"{split}.jsonl.gz"}))


if __name__ == "__main__":
    main()
