"""Names of steps, and the artifacts of a run by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sdft_ray.store.manifest import Manifest


class StepName(NamedTuple):
    """Name of a step in its parts: `STAGE`, `STAGE:SUBJECT` or `STAGE:SUBJECT@TRIAL`, such as `train:kd@0.001#0`."""

    stage: str
    subject: str = ""
    """The arm, model or pruning that the step is about; "" where a recipe has one such step."""
    trial: str = ""
    """`RATE` or `RATE#SEED`, where an arm has several trainings."""

    @classmethod
    def parse(cls, name: str) -> StepName:
        stage, _, label = name.partition(":")
        return cls(stage, *label.split("@", 1))

    @property
    def label(self) -> str:
        """`SUBJECT@TRIAL`, without what is empty: what a recipe calls the arm, trial, model or pruning."""
        return f"{self.subject}@{self.trial}" if self.trial else self.subject

    def __str__(self) -> str:
        return f"{self.stage}:{self.label}" if self.subject else self.stage


def by_label(manifests: Mapping[str, Manifest], stage: str) -> dict[str, Manifest]:
    """Label of a step (`StepName.label`) -> its artifact, for all steps of a stage, in their order."""
    names = {name: StepName.parse(name) for name in manifests}
    return {name.label: manifests[step] for step, name in names.items() if name.stage == stage}
