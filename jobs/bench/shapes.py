"""Depth, width or both? What the laboratory's teacher keeps when it is made smaller in different ways.

    python jobs/bench/shapes.py [--quick] [--only depth_9 width_9 ...] [--seeds 3] [--steps 120] [--store DIR]

Sizes are those of the teacher without 3 and without 5 of its 12 blocks (76.6 % and 61.0 % of its parameters). At each,
blocks alone, width alone (hidden and MLP channels in proportion) and both together, recovered alike: forward-KL logit
distillation on the teacher's own words. At the smaller size also: blocks with a patch at the cut; in two steps with as
much training in all as in one; and fine-tuning on references (SFT), on self-data (SDFT), distillation on references
(KD), and cross-entropy and distillation together on self-data (SDFT + KD).

The rate of every way is the better of two on held-out rows, at the first seed (that of an earlier step is the lower
one). All artifacts stay in the store, so an
interrupted run goes on where it was, and its reports can be read. Recovery is mean score over the teacher's; the table
shows the mean over seeds, the extremes, and the pruned model before recovery. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from sdft_ray.lab.export import export
from sdft_ray.models.size import size_with_blocks
from sdft_ray.pipeline.compress import compress
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.report.run.model import ReportData

RATES = (0.0005, 0.001)
KD = {"cross_entropy": 0.0, "forward_kl": 1.0}
DEPTH = {"metric": "angular_distance", "position": "mean"}
WIDTH = {"hidden": "target", "mlp": "target"}
RESOURCES = {"train": {"num_workers": 1, "checkpoint_every": 1000}}


def ways(config: dict[str, Any], num_steps: int) -> dict[str, dict[str, Any]]:
    """Way -> what of the recipe it sets, and its arm."""
    experiments: dict[str, dict[str, Any]] = {}
    arm = {"data": "distilled", "objective": KD}
    for num_kept in (9, 7):
        depth = {"depth": {**DEPTH, "remove_blocks": 12 - num_kept}}
        target = {"target": {"parameters": size_with_blocks(config, num_kept).num_parameters}}
        both = {"depth": {**DEPTH, "remove_blocks": "target"}, "width": WIDTH}
        experiments[f"depth_{num_kept}"] = {"recipe": depth, "arm": arm}
        experiments[f"width_{num_kept}"] = {"recipe": {"width": WIDTH, **target}, "arm": arm}
        experiments[f"both_{num_kept}"] = {"recipe": {**both, **target}, "arm": arm}
    smaller = experiments["depth_7"]["recipe"]
    experiments["depth_7_patched"] = {"recipe": {**smaller, "patch": {}}, "arm": arm}
    first = {"depth": {**DEPTH, "remove_blocks": 3}, "arm": {**arm, "learning_rate": RATES[0]}, "num_steps": num_steps}
    in_steps = {"depth": {**DEPTH, "remove_blocks": 2}, "steps": [first]}
    experiments["depth_7_in_two_steps"] = {"recipe": in_steps, "arm": arm}
    experiments["depth_7_twice_as_long"] = {"recipe": smaller, "arm": arm, "num_steps": 2 * num_steps}
    arms = {
        "sft": {"data": "reference"},
        "sdft": {"data": "distilled"},
        "kd": {"data": "reference", "objective": KD},
        "sdft_kd": {"data": "distilled", "objective": {"forward_kl": 1.0}},
    }
    return experiments | {f"depth_7_{name}": {"recipe": smaller, "arm": arm} for name, arm in arms.items()}


def recipe_of(lab: Path, name: str, way: dict[str, Any], arms: dict[str, Any], options: argparse.Namespace) -> Recipe:
    base = yaml.safe_load((lab / "quickstart.yaml").read_text(encoding="utf-8"))
    del base["depth"]
    base["train"] |= {"arms": arms, "validation_fraction": 0.1, "num_steps": way.get("num_steps", options.steps)}
    if options.limit:
        base["evaluate"]["limit"] = options.limit
    base |= {"name": name, "description": "A way to make the laboratory's teacher smaller", **way["recipe"]}
    return Recipe.parse(base, base=lab)


def measure(lab: Path, name: str, way: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Choose the rate at the first seed, then train the other seeds with it."""
    first = {"seed_0": {**way["arm"], "seed": 0, "learning_rate": list(RATES)}}
    data = report_of(lab, name, way, first, options)
    rate = next(trial.learning_rate for trial in data.grids["seed_0"].trials if trial.chosen)
    arms = {f"seed_{seed}": {**way["arm"], "seed": seed, "learning_rate": rate} for seed in range(options.seeds)}
    if options.seeds > 1:
        data = report_of(lab, name, way, arms, options)
    values = [value for arm in arms if (value := data.recovery[arm].mean.value) is not None]
    assert data.sizes is not None, "a run has sizes"
    assert data.plan is not None, "a run has a plan"
    return {
        "way": name,
        "share": data.sizes.pruned.num_parameters / data.sizes.teacher.num_parameters,
        "num_blocks": len(data.plan.keep_blocks),
        "widths": {space: num_kept for space, (num_kept, _) in data.plan.widths.items()},
        "before": data.recovery["patched" if "patched" in data.recovery else "pruned"].mean.value,
        "learning_rate": rate,
        "recovery": values,
        "mean": statistics.fmean(values),
    }


def report_of(
    lab: Path, name: str, way: dict[str, Any], arms: dict[str, Any], options: argparse.Namespace
) -> ReportData:
    """Run one recipe; what is in the store already is taken over."""
    view = "plain" if options.verbose else "none"
    recipe, resources = recipe_of(lab, name, way, arms, options), Resources.model_validate(RESOURCES)
    return compress(recipe, options.store, resources, view=view).report_data()


def show(console: Console, figures: list[dict[str, Any]]) -> None:
    table = Table("way", "model", title="Recovery of the laboratory's teacher, per cent", title_justify="left")
    for column in ("parameters", "pruned", "rate", "recovered", "extremes"):
        table.add_column(column, justify="right")
    for row in figures:
        widths = ", ".join(f"{space} {num_kept}" for space, num_kept in row["widths"].items())
        table.add_row(
            row["way"],
            f"{row['num_blocks']} blocks" + (f", {widths}" if widths else ""),
            f"{100 * row['share']:.1f}",
            f"{100 * row['before']:.1f}",
            f"{row['learning_rate']:g}",
            f"{100 * row['mean']:.1f}",
            f"{100 * min(row['recovery']):.1f} - {100 * max(row['recovery']):.1f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="depth_9 and width_9, one seed, few steps and items")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these ways alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--limit", type=int, help="test items per family")
    parser.add_argument("--store", default=".shapes", help="where artifacts stay (.shapes)")
    parser.add_argument("--verbose", action="store_true", help="tell each stage")
    options = parser.parse_args()
    if options.quick:
        options.only, options.seeds = ["depth_9", "width_9"], 1
        options.steps, options.limit = min(options.steps, 10), options.limit or 20
    lab = export(Path(options.store) / "laboratory").resolve()
    config = json.loads((lab / "teacher/config.json").read_text(encoding="utf-8"))
    console, figures = Console(), []
    for name, way in ways(config, options.steps).items():
        if options.only and name not in options.only:
            continue
        figures.append(measure(lab, name, way, options))
        console.print(f"{name}: {[round(100 * value, 1) for value in figures[-1]['recovery']]}", highlight=False)
    show(console, figures)
    means = {row["way"]: row["mean"] for row in figures}
    ratio = means["width_9"] / means["depth_9"] if {"width_9", "depth_9"} <= means.keys() else None
    print(json.dumps({"benchmark": "shapes", "ratio": ratio, "steps": options.steps, "ways": figures}))


if __name__ == "__main__":
    main()
