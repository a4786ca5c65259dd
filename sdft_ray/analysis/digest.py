"""A digest of studies: what is finished in a store, in one small file that work of other days and stores is added to.

Entries go by the fingerprint of the artifact that they tell of, so the same result is never there twice, and one that
is there stays. Of an evaluation the values of all items are kept, so that any two models of the file can be compared
later. The page beside it is made from the file alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdft_ray.errors import StoreError
from sdft_ray.pipeline.scheduler import GraphRun
from sdft_ray.pipeline.study import walks_of
from sdft_ray.recipe.study import Group, Study, arm_name
from sdft_ray.report.run.gather import read_scores
from sdft_ray.statistics.scores import Scores, TaskScore
from sdft_ray.store.atomic import replacing
from sdft_ray.store.manifest import Manifest
from sdft_ray.store.store import Store

FORMAT = 1
_PARTS = ("studies", "students", "evaluations", "trainings", "steps")
_DIGITS = 4
"""Of values that are not 0 or 1."""
Digest = dict[str, Any]
"""Part -> key -> entry, plain data. `students` and `evaluations` go by the fingerprint of an evaluation, `trainings` by
that of a training, `steps` by the address of any other artifact, `studies` by name."""


def empty() -> Digest:
    """Without entries."""
    return {"format": FORMAT, **{part: {} for part in _PARTS}}


def read_digest(path: Path) -> Digest:
    """An empty one where there is no file. Raises `StoreError` for a file that is no digest."""
    if not path.exists():
        return empty()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not set(_PARTS) <= found.keys():
        raise StoreError(f"{path} is no digest of studies", "name another file, or remove it")
    return found


def merged(known: Digest, found: Digest) -> tuple[Digest, int]:
    """Both together, and how many entries are new. What is known stays, except what is said of a study; what an entry
    lacks is added to it."""
    whole: Digest = {"format": FORMAT}
    for part in _PARTS:
        own, other = known[part], found[part]
        whole[part] = {key: {**other.get(key, {}), **own.get(key, {})} for key in (*own, *(other.keys() - own.keys()))}
    whole["studies"] = {**known["studies"], **found["studies"]}
    return whole, sum(len(whole[part]) - len(known[part]) for part in _PARTS)


def write_digest(digest: Digest, path: Path) -> None:
    """One entry a line, sorted, so that additions are lines of a diff."""
    parts = []
    for part in _PARTS:
        entries = [f"  {json.dumps(key)}: {_line(digest[part][key])}" for key in sorted(digest[part])]
        parts.append(f'"{part}": {{\n' + ",\n".join(entries) + ("\n}" if entries else "}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(f'{{"format": {FORMAT},\n' + ",\n".join(parts) + "}\n", encoding="utf-8")


def _line(entry: Any) -> str:
    return json.dumps(entry, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# --- from a store -------------------------------------------------------------------------------------------


def collect(study: Study, store: Store, *, data: Path | None = None) -> Digest:
    """All of a study that is finished in a store, of every recipe of it; `data` as in `pipeline.study.run_study`.

    Raises `UserError` as planning the study does.
    """
    digest = empty()
    digest["studies"][study.name] = {"description": study.description, "arms": list(study.arms)}
    for group, walk in walks_of(study, store, data=data):
        manifests = {name: state.manifest for name, state in walk.states.items() if state.manifest is not None}
        wanted = {name: manifests[name] for name in walk.steps_wanted() if name in manifests}
        digest["trainings"] |= dict(_trainings(study, group, walk, wanted))
        digest["steps"] |= {
            own.address: {"stage": own.stage, **_made(own)}
            for own in wanted.values()
            if own.stage not in ("train", "evaluate", "choose")
        }
        scores = read_scores(store, wanted)
        digest["evaluations"] |= {
            wanted[f"evaluate:{model}"].fingerprint[:16]: _evaluation(own, wanted, model)
            for model, own in scores.items()
        }
        digest["students"] |= dict(_students(study, group, walk, wanted))
    return digest


def _trainings(
    study: Study, group: Group, walk: GraphRun, manifests: Mapping[str, Manifest]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, own in manifests.items():
        if own.stage != "train":
            continue
        trial = walk.recipe.train.trials[name.removeprefix("train:")]
        outcome = {key: own.summary[key] for key in ("held_out_loss", "diverged", "num_steps") if key in own.summary}
        settings = {"data": trial.data, "learning_rate": trial.learning_rate, "seed": trial.seed}
        objective = trial.objective.model_dump(mode="json", exclude_defaults=True)
        yield (
            own.fingerprint[:16],
            {
                **_where(study, group),
                **settings,
                **({"objective": objective} if objective else {}),
                "num_rows": trial.num_rows,
                **outcome,
                **_made(own),
            },
        )


def _where(study: Study, group: Group) -> dict[str, Any]:
    return {
        "study": study.name,
        "variant": group.variant,
        "metric": group.metric,
        "remove_blocks": group.remove_blocks,
    }


def _made(own: Manifest) -> dict[str, Any]:
    """When, in how many seconds, and by what."""
    versions = {name: version for name, version in own.versions.items() if name != "python"}
    return {"made": own.created[:16], "seconds": round(own.usage.wall_s, 1), "versions": versions}


def _evaluation(scores: Scores, manifests: Mapping[str, Manifest], model: str) -> dict[str, Any]:
    own = manifests[f"evaluate:{model}"]
    forgotten = manifests.get(f"forget:{model}")
    known = {key: forgotten.summary[key] for key in ("nll", "kl") if key in forgotten.summary} if forgotten else {}
    return {
        "tasks": {name: _task(score) for name, score in scores.tasks.items() if not score.not_averaged},
        **({"texts": known} if known else {}),
        **_made(own),
    }


def _task(score: TaskScore) -> dict[str, Any]:
    written = {} if score.written is None else {"tokens_per_answer": round(score.written.mean_tokens, 1)}
    return {
        "metric": score.metric,
        "score": round(score.value, 6),
        "n": score.n,
        "chance": None if score.chance is None else round(score.chance, 4),
        "items": packed([score.items[item] for item in sorted(score.items)]),
        **written,
    }


def packed(values: list[float]) -> Any:
    """Values of items as hexadecimal digits of four bits each where all are 0 or 1, else rounded; see `unpacked`."""
    if set(values) <= {0.0, 1.0}:
        bits = "".join("1" if value else "0" for value in values)
        digits = (bits[start : start + 4].ljust(4, "0") for start in range(0, len(bits), 4))
        return {"bits": len(bits), "hex": "".join(f"{int(digit, 2):x}" for digit in digits)}
    return [round(value, _DIGITS) for value in values]


def unpacked(items: Any) -> list[float]:
    """The inverse of `packed`, rounded."""
    if not isinstance(items, dict):
        return list(items)
    bits = "".join(f"{int(digit, 16):04b}" for digit in items["hex"])
    return [float(bit) for bit in bits[: items["bits"]]]


def _students(
    study: Study, group: Group, walk: GraphRun, manifests: Mapping[str, Manifest]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those that stand beside an evaluated teacher and pruned model."""
    if not {"evaluate:teacher", "evaluate:pruned", "plan"} <= manifests.keys():
        return
    for arm in group.arms:
        for num_rows in study.num_rows:
            for seed in study.seeds:
                name = arm_name(arm, num_rows, seed)
                own, trained = manifests.get(f"evaluate:{name}"), manifests.get(f"train:{name}")
                if own is None or trained is None:
                    continue
                yield (
                    own.fingerprint[:16],
                    {
                        **_where(study, group),
                        "num_blocks": len(manifests["plan"].summary["plan"]["keep_blocks"]),
                        "arm": arm,
                        "num_rows": num_rows,
                        "seed": seed,
                        "learning_rate": walk.recipe.train.trials[name].learning_rate,
                        "held_out_loss": trained.summary.get("held_out_loss"),
                        "training": trained.fingerprint[:16],
                        "teacher": manifests["evaluate:teacher"].fingerprint[:16],
                        "pruned": manifests["evaluate:pruned"].fingerprint[:16],
                        "tuned": list(walk.recipe.evaluate.tuned),
                    },
                )
