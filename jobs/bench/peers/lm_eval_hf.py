"""lm-eval with its own `hf` model on a folder of task files, as its manual says: scores of every item, and seconds.

    python jobs/bench/peers/lm_eval_hf.py JOB.json

Stands alone: it uses lm-eval and nothing of `sdft_ray`. Task files name their data relative to their folder, which is
where it works. The job holds `model`, `tasks` (a folder), `names` of tasks, `dtype`, `batch_size`. The last line is one
JSON object: start-up (imports and the model) and each task's seconds apart, and `metric -> values by item` per task.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.chdir(job["tasks"])
    print(json.dumps(measure(job)))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    hf: Any = HFLM
    model = hf(pretrained=job["model"], dtype=job["dtype"], batch_size=job["batch_size"], device="cpu")
    manager = TaskManager(include_path=".", include_defaults=False)
    run: Any = lm_eval.simple_evaluate
    output: dict[str, Any] = {"startup_s": time.perf_counter() - start, "seconds": {}, "items": {}}
    for name in job["names"]:
        start = time.perf_counter()
        results = run(model=model, tasks=[name], task_manager=manager, apply_chat_template=True, bootstrap_iters=0)
        output["seconds"][name] = time.perf_counter() - start
        output["items"][name] = {str(row["doc_id"]): _values(row) for row in results["samples"][name]}
    return output


def _values(row: dict[str, Any]) -> dict[str, Any]:
    """Metrics of one item, and what was written or how likely each option was."""
    metrics = {name: row[name] for name in ("acc", "exact_match") if name in row}
    written = row["resps"][0][0] if isinstance(row["resps"][0][0], str) else [answer[0][0] for answer in row["resps"]]
    return {"metrics": metrics, "answer": written}


if __name__ == "__main__":
    main()
