"""A store with a tiny pruned model, its teacher beside it, and rows as selection leaves them: for stages that score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdft_ray.models.surgery import drop_blocks
from sdft_ray.store.store import MANIFEST
from tests.support.tiny import make_model


def make_pruned_store(root: Path, address: str) -> Path:
    """`root` with `teacher`, and `store` that holds it without its third block, at `address`."""
    pruned = root / "store" / address
    pruned.mkdir(parents=True)
    drop_blocks(make_model(root / "teacher"), pruned, [0, 1, 3])
    (pruned / MANIFEST).write_text("{}", encoding="utf-8")
    return root


def selected_row(i: int, *, kept: bool) -> dict[str, Any]:
    """A sum whose rewrite was kept, or not."""
    reference, rewrite = f"it is #### {2 * i}", f"{i} + {i} = {2 * i} #### {2 * i}"
    return {
        "example_id": f"r{i}", "instruction": f"what is {i} plus {i}", "context": "", "reference_response": reference,
        "distilled_response": rewrite, "response": rewrite if kept else reference,
        "source": "distilled" if kept else "reference", "reason": "kept" if kept else "mismatch",
        "answer_kind": "number", "check": "", "family": "",
    }  # fmt: skip
