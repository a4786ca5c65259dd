"""Typed views of a step's slice: the parts of the recipe that its identity holds, and nothing else of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from sdft_ray.recipe.arms import Arm, Train, Trial
from sdft_ray.recipe.pruning import Pruning
from sdft_ray.recipe.yaml_model import STORED, StrictPart, as_frozen
from sdft_ray.stages.graph import Step

Part = TypeVar("Part", bound=StrictPart)


def view(
    kind: type[Part], data: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, absent: Collection[str] = ()
) -> Part:
    """Fields of a slice as a part of the recipe; a field that the slice leaves out has its default.

    `given` are fields that say where something lies; identity has its digest instead. `absent` are fields of `kind`
    that are not in the slice: to read one is an `AttributeError`. An entry of the slice that `kind` does not know is an
    error too.
    """
    content = {name: value for name, value in data.items() if name != "replicate"}
    part = kind.model_validate(as_frozen({**content, **(given or {})}), context=STORED)
    for name in absent:
        assert name not in content, f"{name} is in the slice"
        vars(part).pop(name, None)
    return part


def pruning_view(step: Step) -> Pruning:
    """`depth`, `width` and `target` in the slice of a step of `rate`, `measure` or `plan`."""
    data = step.slice.get("drops", step.slice)
    sizes = {name: _own(data[name]) for name in ("width", "target") if name in data}
    depth = data["depth"] if "depth" in data else {name: value for name, value in data.items() if name not in sizes}
    return view(Pruning, {"depth": _own(depth), **sizes}, absent=("patch", "distil_from"))


def trial_view(step: Step) -> Trial:
    """The training that a step of `train` or `correct` is about."""
    return view(Trial, step.slice["arm"])


def train_view(step: Step) -> Train:
    """The settings of a step of `train` or `correct`; its one arm is called by the step's label."""
    settings = {name: value for name, value in step.slice.items() if name != "arm"}
    train = view(Train, {**settings, "arms": {"student": _own(step.slice["arm"])}})
    return train.model_copy(update={"arms": {step.label: view(Arm, step.slice["arm"])}})


def _own(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without the recipe's `replicate`, which every part of a slice carries."""
    return {name: value for name, value in data.items() if name != "replicate"}
