"""What tests of whole runs share: identity is content, so what one of them makes, the others reuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.support.worlds import make_world

WORDS = {
    "task": "tiny_words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "one",
    "generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_world`; also `unchecked.jsonl`, a seed set whose rewrites are all kept, and the task `tiny_words`.

    Tests only add files of their own. `store` in it is for runs whose tests do not count what is in a store.
    """
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "tasks/tiny_words.yaml").write_text(yaml.safe_dump(WORDS), encoding="utf-8")
    rows = [{"id": f"r{i}", "instruction": f"what is {i}", "reference": f"it is {i} and {2 * i}"} for i in range(16)]
    (folder / "unchecked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
