"""A made-up study: students whose chance to be right follows known curves. None of its figures was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sdft_ray.report.toolbox.words import Words

TASKS = ("word_problems", "lists", "ordering", "facts", "myths", "scripts", "pronouns")
TUNED = TASKS[:3]
ARMS = ("sft", "sdft", "sdft_kd", "tail")
SIZES = (125, 300, 700, 1700, 4000)
TEACHER = (0.975, 0.925, 0.95, 0.965, 0.96, 0.955, 0.985)
PRUNED = (0.05, 0.34, 0.61, 0.88, 0.83, 0.9, 0.945)
TAIL_PRUNED = (0.02, 0.2, 0.41, 0.7, 0.68, 0.73, 0.8)
LISTS = {"items", "teacher_items"}


def share(arm: str, task: str, num_rows: int, remove_blocks: int) -> float:
    """The share of the teacher's score that a student has: tuned tasks rise, off-domain ones move little."""
    depth = remove_blocks / 3
    if task in TUNED:
        ceiling = {"sft": 0.86, "sdft": 0.94, "sdft_kd": 0.95, "tail": 0.7}[arm]
        return ceiling - 0.02 * depth - depth * 3.0 * num_rows**-0.55
    if arm == "sft":
        return 0.93 - 0.02 * depth - 0.02 * math.log(num_rows / 125)
    return {"sdft": 0.955, "sdft_kd": 0.965, "tail": 0.85}[arm] - 0.02 * depth


def rows(
    *,
    sizes: Sequence[int] = SIZES,
    blocks: Sequence[int] = (3, 5),
    arms: Sequence[str] = ARMS,
    num_seeds: int = 5,
    num_items: int = 200,
    variants: Sequence[str] = ("mixed", "word_problems"),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """As dictionaries. Every item has a difficulty that all models share; every student has a mood of its own."""
    rng = np.random.default_rng(seed)
    hard_TI = rng.standard_normal((len(TASKS), num_items))
    teacher_TI = _right(np.array(TEACHER)[:, None], hard_TI, rng)
    found = []
    for variant in variants:
        tuned = TUNED if variant != "word_problems" else TASKS[:1]
        for remove_blocks in blocks:
            for arm in arms:
                for num_rows in sizes:
                    for student in range(num_seeds):
                        mood = 0.01 * rng.standard_normal()
                        for t, task in enumerate(TASKS):
                            p = TEACHER[t] * share(arm, task, num_rows, remove_blocks) + mood
                            items_I = _right(p, hard_TI[t], rng)
                            found.append(
                                {
                                    "variant": variant,
                                    "metric": "tail" if arm == "tail" else "angular_distance",
                                    "remove_blocks": remove_blocks,
                                    "num_blocks": 12 - remove_blocks,
                                    "arm": arm,
                                    "num_rows": num_rows,
                                    "seed": student,
                                    "learning_rate": 7e-4 if num_rows > 500 else 2e-3,
                                    "held_out_loss": 0.2 + 1 / num_rows,
                                    "task": task,
                                    "tuned": task in tuned,
                                    "chance": None if task in TUNED else 0.25,
                                    "score": float(items_I.mean()),
                                    "stderr": float(items_I.std() / math.sqrt(num_items)),
                                    "n": num_items,
                                    "teacher_score": float(teacher_TI[t].mean()),
                                    "pruned_score": (TAIL_PRUNED if arm == "tail" else PRUNED)[t],
                                    "items": items_I.tolist(),
                                    "teacher_items": teacher_TI[t].tolist(),
                                }
                            )
    return found


def table(found: list[dict[str, Any]]) -> pa.Table:
    """With the types that the study's runner writes."""
    kinds = {
        "variant": pa.string(),
        "metric": pa.string(),
        "arm": pa.string(),
        "task": pa.string(),
        "tuned": pa.bool_(),
    }
    kinds |= dict.fromkeys(("remove_blocks", "num_blocks", "num_rows", "seed", "n"), pa.int32())
    kinds |= dict.fromkeys(LISTS, pa.list_(pa.float32()))
    names = found[0].keys()
    return pa.Table.from_pylist(found, schema=pa.schema([(name, kinds.get(name, pa.float64())) for name in names]))


def _right(p: float | np.ndarray, hard: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1 where a latent skill of mean Phi^-1(p) beats an item's difficulty and some luck, of equal variances."""
    latent = _probit(np.clip(p, 0.005, 0.995)) * math.sqrt(2) - hard - rng.standard_normal(hard.shape)
    return (latent > 0).astype(np.float32)


def _probit(p: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return ndtri(p)


def plain_text(words: Sequence[Words]) -> str:
    return "".join(part.text for part in words)
