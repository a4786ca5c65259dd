"""Whether the channels, heads and blocks that our measurement ranks first are those of an independent package.

    python jobs/bench/ranking.py [--quick] [--keep 0.7] [--peer-python .venv-bench/bin/python]

The laboratory's teacher is measured on half of its calibration rows, by us in padded batches and by NVIDIA ModelOpt,
in its own environment (`make bench-env`), row by row. Its rankings (see `peers/modelopt_ranking.py`):

- `l2_norm`: Minitron's, by the formula that is our default, so for MLP and hidden channels both must agree but for
  rounding. For heads ModelOpt takes means before it takes the length of a head's channels, we after, as the paper does.
- `contribution`: Puzzle's, by other formulas. How far it parts from ours is shown, not bounded.

ModelOpt ranks blocks only with Megatron (importing `modelopt.torch.prune.plugins.mcore_minitron` fails: `No module
named 'megatron'`) or on a GPU (Puzzle's `validate_puzzle_solutions`), so here blocks, by their influence, are compared
with chance and ourselves alone.

Beside them stand our own ranking on the other half of the rows (another formula can hardly be expected to agree
better) and random ones. Figures are means over blocks, with extremes: the rank correlation (Spearman), and the share in
common of what the two keep. The laboratory has two heads to a block.

The judge is the loss of the teacher with its MLPs cut to what each ranking keeps, on the responses of rows that nobody
measured. Questions are left out: the teacher never learned to predict them, and has 9 nats there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdft_ray.data.calibration import CalibrationBatch, calibration_batches
from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.importance.depth import measure
from sdft_ray.importance.width import watched
from sdft_ray.lab import sets
from sdft_ray.lab.export import QUICKSTART, TEACHER
from sdft_ray.models.channels import Channels, Members
from sdft_ray.models.loading import load_model
from sdft_ray.models.surgery import prune_checkpoint
from sdft_ray.recipe.recipe import Recipe

BOUND_RATIO = 0.999
"""At least, for MLP and for hidden channels by the same formula."""
PEER_PYTHON = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
PEER = Path(__file__).parent / "peers" / "modelopt_ranking.py"
BATCH_TOKENS = 4096
JUDGED_TOGETHER = 32
SPACES = ("mlp", "hidden", "heads", "blocks")
OURS, OTHER_HALF, SAME_FORMULA = "ours", "ours, other half", "modelopt l2_norm"

Figures = dict[str, Any]
Scores = Mapping[str, NDArray[np.float64]]
"""By space: (L, C) for `mlp` and `heads` of L blocks, (1, C) for `hidden` and `blocks`, which have one order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer random rankings, and fewer rows to judge by")
    parser.add_argument("--keep", type=float, default=0.7, help="share of a space that stays")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="of an environment with ModelOpt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_random, num_judged = (2, 140) if arguments.quick else (5, 350)
    half = sets.NUM_CALIBRATION // 2
    measured = batches("calibration", 0, half)
    rankings = {OURS: our_scores(measured), OTHER_HALF: our_scores(batches("calibration", half, 2 * half))}
    version = None
    if arguments.peer_python.exists():
        theirs, version = peer_scores(arguments.peer_python, measured)
        rankings |= theirs
    else:
        print(
            f"{arguments.peer_python} is missing, so ModelOpt is left out: `make bench-env` makes it", file=sys.stderr
        )
    chance = [random_scores(rankings[OURS], seed) for seed in range(num_random)]
    agreement = {
        space: {
            name: agree(rankings[OURS][space], [scores[space] for scores in drawn], arguments.keep)
            for name, drawn in [*((name, [scores]) for name, scores in rankings.items()), ("random", chance)]
            if name != OURS and space in drawn[0]
        }
        for space in SPACES
    }
    judges = judging_batches(num_judged)
    losses = {"whole": [loss(TEACHER, judges)]}
    losses |= {name: [loss_without(scores, judges, arguments.keep)] for name, scores in rankings.items()}
    losses["random"] = [loss_without(scores, judges, arguments.keep) for scores in chance]
    same = same_formula(rankings[OURS], rankings[SAME_FORMULA]) if version else None
    show(agreement, losses, {"keep": arguments.keep, "peer": version, "same_formula": same})


def batches(name: str, start: int, stop: int) -> list[CalibrationBatch]:
    """Rows [start, stop) of a set of the laboratory, as the stage `measure` sees them."""
    names = {"id": "example_id", "reference": "reference_response"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in sets.seed_rows(name)[start:stop]]
    table = pa.Table.from_pylist([{"check": "", "context": "", **row} for row in rows], schema=SEED_SCHEMA)
    max_tokens = Recipe.load(QUICKSTART).calibration.max_tokens
    return calibration_batches(table, load_tokenizer(TEACHER), max_tokens=max_tokens, batch_tokens=BATCH_TOKENS)


def our_scores(rows: Sequence[CalibrationBatch]) -> Scores:
    model = load_model(TEACHER, "float32")
    with watched(model) as watch:
        depth = measure(model, [batch[:2] for batch in rows], watch=watch).scores()
    width = watch.moments
    return {
        "mlp": width.scores("mlp"),
        "hidden": width.scores("hidden")[None],
        "heads": width.scores("heads"),
        "blocks": np.array([depth.block_influence_L]),
    }


def peer_scores(python: Path, rows: Iterable[CalibrationBatch]) -> tuple[dict[str, Scores], str]:
    """The peer's rankings on the same rows, and its version."""
    documents = [ids[mask.bool()].tolist() for batch in rows for ids, mask in zip(*batch[:2], strict=True)]
    job = {"model": str(TEACHER), "rows": documents}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run([python, PEER, path], stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    rankings: dict[str, Scores] = {
        f"modelopt {name}": {space: np.atleast_2d(values) for space, values in spaces.items()}
        for name, spaces in result["scores"].items()
    }
    return rankings, f"nvidia-modelopt {result['version']}"


def random_scores(like: Scores, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return {space: rng.random(scores.shape) for space, scores in like.items()}


def kept_members(scores_C: NDArray[np.float64], keep: float) -> Members:
    """The highest, at least one; shares are rounded down."""
    count = max(1, math.floor(keep * len(scores_C) + 1e-9))
    return tuple(sorted(np.argsort(-scores_C, kind="stable")[:count].tolist()))


def agree(ours_LC: NDArray[np.float64], drawn: Iterable[NDArray[np.float64]], keep: float) -> Figures:
    """Mean and extremes over blocks (of all rankings that are drawn)."""
    pairs = [pair for theirs_LC in drawn for pair in zip(ours_LC, theirs_LC, strict=True)]
    common = [
        len({*kept_members(ours, keep)} & {*kept_members(theirs, keep)}) / len(kept_members(ours, keep))
        for ours, theirs in pairs
    ]
    return {
        **spread("spearman", [spearman(ours, theirs) for ours, theirs in pairs]),
        **spread("kept_in_common", common),
    }


def spread(name: str, values: Sequence[float]) -> Figures:
    return {name: sum(values) / len(values), f"{name}_spread": [min(values), max(values)]}


def spearman(one_C: NDArray[np.float64], other_C: NDArray[np.float64]) -> float:
    """Correlation of ranks, in [-1, 1]. Scores are sums of measured lengths, so ties do not happen."""
    differences = one_C.argsort().argsort() - other_C.argsort().argsort()
    return 1 - 6 * int((differences**2).sum()) / (len(one_C) ** 3 - len(one_C))


def same_formula(ours: Scores, theirs: Scores) -> dict[str, float]:
    """The largest relative difference of scores that one formula gives twice."""
    return {space: float(np.abs(ours[space] / theirs[space] - 1).max()) for space in ("mlp", "hidden")}


def judging_batches(num_rows: int) -> list[tuple[Tensor, Tensor]]:
    """Token ids and targets, right-padded: the ids of responses, -100 elsewhere."""
    chat = ChatFormat(load_tokenizer(TEACHER))
    rows = sets.seed_rows("heldout")[:num_rows]
    documents = sorted(
        (chat.encode(row["instruction"], row["reference"]) for row in rows), key=lambda text: len(text.ids)
    )
    pairs = [
        (torch.tensor(text.ids), torch.tensor(text.ids).masked_fill(~torch.tensor(text.loss_mask), -100))
        for text in documents
    ]
    parts = [pairs[start : start + JUDGED_TOGETHER] for start in range(0, len(pairs), JUDGED_TOGETHER)]
    return [
        (
            pad_sequence([ids_T for ids_T, _ in part], batch_first=True),
            pad_sequence([targets_T for _, targets_T in part], batch_first=True, padding_value=-100),
        )
        for part in parts
    ]


def loss_without(scores: Scores, rows: Iterable[tuple[Tensor, Tensor]], keep: float) -> float:
    """Of the teacher with the share `keep` of each block's MLP channels, the first of `scores`."""
    members = tuple(kept_members(scores_C, keep) for scores_C in scores["mlp"])
    with tempfile.TemporaryDirectory() as folder:
        prune_checkpoint(TEACHER, Path(folder), range(len(members)), Channels(mlp=members))
        return loss(Path(folder), rows)


@torch.inference_mode()
def loss(directory: Path, rows: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean over all tokens of responses, in nats."""
    model = load_model(directory, "float32")
    total, num_tokens = 0.0, 0
    for ids_BT, targets_BT in rows:
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        labels_BT = targets_BT[:, 1:]
        total += float(F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum"))
        num_tokens += int((labels_BT != -100).sum())
    return total / num_tokens


def show(agreement: Mapping[str, Mapping[str, Figures]], losses: Mapping[str, Sequence[float]], facts: Figures) -> None:
    console = Console()
    table = Table("space", "ours against", "Spearman", "kept in common", box=None)
    for space, rankings in agreement.items():
        for name, result in rankings.items():
            cells = [(result[key], *result[f"{key}_spread"]) for key in ("spearman", "kept_in_common")]
            table.add_row(space, name, *("{:.3f} ({:.2f} to {:.2f})".format(*cell) for cell in cells))
    console.print(table)
    table = Table(f"MLP cut to {facts['keep']:.0%} by", "loss", "min", "max", "above whole", box=None)
    [whole] = losses["whole"]
    for name, values in losses.items():
        mean = sum(values) / len(values)
        table.add_row(name, *(f"{value:.4f}" for value in (mean, min(values), max(values), mean - whole)))
    console.print(table)
    same = [agreement[space][SAME_FORMULA]["spearman"] for space in ("mlp", "hidden")] if facts["peer"] else []
    result: Figures = {
        "benchmark": "ranking",
        "ratio": same[0] if same else None,
        "ratio_hidden": same[1] if same else None,
        "bound_ratio": BOUND_RATIO,
        "within_bounds": min(same) >= BOUND_RATIO if same else None,
        **facts,
        "agreement": agreement,
        "loss": {name: spread("nats", values) for name, values in losses.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
