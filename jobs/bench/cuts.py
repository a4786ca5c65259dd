"""Which cut? What every depth metric would remove, the loss on held-out responses, and how sure each choice is.

    python jobs/bench/cuts.py MODEL --set gsm8k=train.jsonl --set dolly=train.jsonl.gz [--remove 6 10] [--work DIR]

Of each set the rows of at most `--max-tokens` tokens are drawn at random: 64 to calibrate on, then others to judge by.
Every metric chooses on the calibration rows as stage `measure` does (losses without single blocks and runs on a sample
of them), and `best` compares the choices on the calibration rows. All choices are then judged by the loss on the
responses of held-out rows of every set, which nobody measured. Losses are kept in `--work`, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdft_ray.data.calibration import CalibrationBatch, calibration_batches, row_documents
from sdft_ray.data.chat import load_tokenizer
from sdft_ray.data.rows import read_source
from sdft_ray.data.subset import drawn, spread
from sdft_ray.generation.checks import check_error
from sdft_ray.importance.depth import measure_parts
from sdft_ray.importance.moments import DepthMoments, DepthScores
from sdft_ray.importance.perplexity import SetLosses, set_losses
from sdft_ray.models.loading import load_model
from sdft_ray.models.source import ModelSource, read_config
from sdft_ray.pruning.proposals import Proposal, proposals
from sdft_ray.pruning.stability import Stability, stability
from sdft_ray.recipe.inputs import Calibration
from sdft_ray.stages.measure import NUM_PARTS, SAMPLE_ROWS

NUM_CALIBRATION = 64
ROWS_AT_ONCE = 4

Blocks = tuple[int, ...]


@dataclass(frozen=True)
class Drops:
    """What `proposals` reads of losses."""

    num_removed: int
    one_loss_L: Sequence[float]
    run_loss_S: Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="without it, nothing is measured")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=FILE", help="JSON Lines, at least one")
    parser.add_argument("--remove", type=int, nargs="+", default=[6, 10], help="numbers of blocks")
    parser.add_argument(
        "--compared", type=int, default=NUM_CALIBRATION, help="calibration rows that `best` compares on"
    )
    parser.add_argument("--held-out", type=int, default=64, help="rows of each set to judge by")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("build/cuts"))
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.model is None or not asked.set:
        print("cuts: name a model and at least one --set, such as gsm8k=train.jsonl")
        return
    torch.set_num_threads(asked.threads)
    asked.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.model, asked.work)
    num_rows = NUM_CALIBRATION + asked.held_out
    sets = {
        name: bench.rows(file, num_rows, asked.max_tokens) for name, file in (one.split("=", 1) for one in asked.set)
    }
    chosen = {name: bench.choices(name, rows.slice(0, NUM_CALIBRATION), asked.remove) for name, rows in sets.items()}
    for num_removed in asked.remove:
        cuts = [(), *dict.fromkeys(one.blocks for found in chosen.values() for one in found[num_removed])]
        judged = {
            name: bench.losses(f"held_{name}_{num_removed}", rows.slice(NUM_CALIBRATION), cuts)
            for name, rows in sets.items()
        }
        for name, rows in sets.items():
            calibration = rows.take(spread(NUM_CALIBRATION, asked.compared))
            found = chosen[name][num_removed]
            own = bench.losses(f"own_{name}_{num_removed}", calibration, [(), *(one.blocks for one in found)])
            show(name, num_removed, found, own, judged)


class Bench:
    """One model, and what is known of it so far."""

    def __init__(self, directory: Path, work: Path) -> None:
        self.model: Any = load_model(directory, "float32")
        config = read_config(ModelSource(directory=str(directory)), None)
        assert config is not None
        self.config, self.work, self.tokenizer = config, work, load_tokenizer(directory)

    def rows(self, file: str, count: int, max_tokens: int) -> Any:
        """A table of `count` rows, drawn at random from those that are short enough."""
        import pyarrow as pa

        table = pa.concat_tables(list(read_source(Calibration(source=file), check_error)))
        found: list[int] = []
        for position in drawn(table["example_id"].to_pylist()):
            (document,) = row_documents(table.slice(position, 1), self.tokenizer, max_tokens + 1)
            found += [position] if len(document.ids) <= max_tokens else []
            if len(found) == count:
                return table.take(found)
        raise SystemExit(f"{file} has {len(found)} rows of at most {max_tokens} tokens, {count} are needed")

    def batches(self, rows: Any) -> list[CalibrationBatch]:
        return calibration_batches(rows, self.tokenizer, max_tokens=10**6, batch_tokens=2048)

    def losses(self, name: str, rows: Any, cuts: Sequence[Blocks]) -> SetLosses:
        """What every row loses without each of the cuts; a few rows at a time, each time kept."""
        total = SetLosses.empty(cuts)
        for start in range(0, rows.num_rows, ROWS_AT_ONCE):
            path = self.work / f"{name}_{start}.json"
            if not path.exists():
                batches = [(*batch[:3], batch.row_B + start) for batch in self.batches(rows.slice(start, ROWS_AT_ONCE))]
                text = set_losses(self.model, batches, cuts).to_json()
                path.with_suffix(".part").write_text(text, encoding="utf-8")
                path.with_suffix(".part").rename(path)
                print(f"{name}: {start + ROWS_AT_ONCE} of {rows.num_rows} rows", flush=True)
            total = total + SetLosses.from_json(path.read_text(encoding="utf-8"))
        return total

    def moments(self, name: str, rows: Any) -> list[DepthMoments]:
        path = self.work / f"moments_{name}.json"
        if not path.exists():
            parts = [DepthMoments.empty(self.model.config.num_hidden_layers)] * NUM_PARTS
            batches = [(*batch[:2], batch.row_B) for batch in self.batches(rows)]
            parts = measure_parts(self.model, batches, parts)
            path.write_text(json.dumps([part.to_json() for part in parts]), encoding="utf-8")
        return [DepthMoments.from_json(text) for text in json.loads(path.read_text(encoding="utf-8"))]

    def choices(self, name: str, rows: Any, amounts: Sequence[int]) -> dict[int, list[Proposal]]:
        """Number of blocks -> what the metrics would remove, judging by these rows; says how sure each is."""
        num_blocks = self.model.config.num_hidden_layers
        parts = self.moments(name, rows)
        scores: DepthScores = sum(parts[1:], parts[0]).scores()
        ones = [(block,) for block in range(num_blocks)]
        runs = {n: [tuple(range(s, s + n)) for s in range(num_blocks - n + 1)] for n in amounts}
        cuts = [*ones, *(run for every in runs.values() for run in every)]
        sample = self.losses(f"sample_{name}", rows.take(spread(rows.num_rows, SAMPLE_ROWS)), cuts)
        loss = dict(zip(cuts, sample.loss_C, strict=True))

        def by_loss(options: Sequence[Blocks], count: int = 1) -> Stability | None:
            columns = [cuts.index(one) for one in options]
            return stability(sample.nats_RC[:, columns].tolist(), sample.tokens_R.tolist(), options, count)

        found = {}
        for n in amounts:
            drops = Drops(n, [loss[one] for one in ones], [loss[run] for run in runs[n]])
            found[n] = proposals(scores, drops, self.config, n)
            sure = {"runs by loss": by_loss(runs[n]), "single blocks by loss": by_loss(ones, n)}
            for position in ("last", "mean"):
                sums, weights = zip(*(part.run_sums(n, position) for part in parts), strict=True)
                sure[f"angular distance, {position}"] = stability(sums, weights, runs[n])
            sums, weights = zip(*(part.influence_sums() for part in parts), strict=True)
            sure["block influence"] = stability(sums, weights, ones, n)
            for metric, one in sure.items():
                assert one is not None
                print(f"{name}, {n} blocks, {metric}: the same in {one.share:.0%}")
        return found


def show(name: str, num_removed: int, found: Sequence[Proposal], own: SetLosses, judged: dict[str, SetLosses]) -> None:
    """A Markdown table: a row for each cut, the one that `best` takes first."""
    sure = stability(*own.parts(), own.removed[1:])
    assert sure is not None
    print(f"\n{num_removed} blocks, calibrated on {name}; `best` takes the same in {sure.share:.0%}, ", end="")
    print(f"{sure.difference:.3f} ± {sure.stderr:.3f} ahead of the next\n")
    columns = [f"loss on {name}, calibration", *(f"{one}, held out" for one in judged)]
    print(f"| without blocks | removed by | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    metrics = {one.blocks: "; ".join(one.metrics) for one in found}
    for number in np.argsort(own.loss_C):
        blocks = own.removed[number]
        losses = [own.loss_C[number], *(one.loss_C[one.removed.index(blocks)] for one in judged.values())]
        cells = " | ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {', '.join(map(str, blocks)) or 'nothing'} | {metrics.get(blocks, '')} | {cells} |")


if __name__ == "__main__":
    main()
