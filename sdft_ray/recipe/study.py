"""The study: one recipe varied over data-set size, blocks, arm, metric, seed and learning rate. YAML in and out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sdft_ray.errors import RecipeError
from sdft_ray.recipe.arms import Objective, Rate
from sdft_ray.recipe.inputs import Place
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import StrictPart, as_frozen, describe_validation_error, read_yaml, with_present_names

Changes = dict[str, Any]
"""A part of a recipe that is laid over it, mapping by mapping; paths in it start at the recipe's folder."""


class StudyArm(StrictPart):
    """One way to recover, with further changes to the recipe for it."""

    data: Literal["reference", "distilled"]
    objective: Objective = Objective()
    recipe: Changes = Field(default={})
    """Such as `{depth: {metric: tail}, train: {train_last_n_layers: 3}}`."""


class Budget(StrictPart):
    """Limit of a study; one that needs more is rejected before anything starts."""

    max_trainings: int | None = Field(default=None, ge=1)


class Study(StrictPart):
    """A grid over one recipe. Every combination is trained with every rate at the first seed; the rate with the lowest
    loss on held-out rows is then trained with the other seeds. With `rates_at`, rates are tried only at that size, and
    the best one of each arm is also used at its other sizes.

    Data-set sizes are nested: each contains the smaller ones (`sdft_ray.data.subset`).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)
    description: str = ""
    recipe: Place
    variants: dict[str, Changes] = Field(default={})
    """Name -> changes to the recipe, such as another seed set; empty: the recipe as it is."""
    metrics: tuple[str, ...] = ()
    """Values of `depth.metric`; empty: that of the recipe."""
    remove_blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Values of `depth.remove_blocks`; empty: that of the recipe."""
    arms: dict[str, StudyArm]
    num_rows: tuple[Annotated[int, Field(ge=1)], ...]
    learning_rates: tuple[Rate, ...]
    rates_at: int | None = None
    """One of `num_rows`; None tries rates at every size."""
    seeds: tuple[int, ...] = (0,)
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _grid_is_a_grid(self) -> Self:
        for axis in ("arms", "num_rows", "learning_rates", "seeds"):
            if not getattr(self, axis):
                raise ValueError(f"the grid is empty: {axis} has no values")
        for axis in ("metrics", "remove_blocks", "num_rows", "learning_rates", "seeds"):
            if len(set(getattr(self, axis))) < len(getattr(self, axis)):
                raise ValueError(f"{axis} lists a value twice")
        if self.rates_at is not None and self.rates_at not in self.num_rows:
            raise ValueError(f"rates_at is {self.rates_at}, which is not among num_rows")
        for name in (*self.arms, *self.variants):
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not a valid arm or variant name: use letters, digits and _")
        if "arms" in {key for arm in self.arms.values() for key in arm.recipe.get("train", {})}:
            raise ValueError("an arm's recipe cannot set train.arms, because the study sets it")
        return self

    @property
    def rated_sizes(self) -> tuple[int, ...]:
        """Sizes at which all rates are tried."""
        return self.num_rows if self.rates_at is None else (self.rates_at,)

    def only(self, variants: Collection[str]) -> Study:
        """The part with these variants; the whole for none. Raises `RecipeError` for one that it does not have."""
        for name in variants:
            if name not in self.variants:
                known = f"it has {', '.join(self.variants)}" if self.variants else "it has none"
                raise RecipeError(f"study {self.name} has no variant {name!r}", known)
        kept = {name: changes for name, changes in self.variants.items() if name in variants}
        return self.model_copy(update={"variants": kept}) if kept else self

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read a YAML file; the recipe's path starts at its folder. Raises `RecipeError`."""
        path = Path(path)
        data = as_frozen(read_yaml(path, RecipeError))
        try:
            return cls.model_validate(data, context={"base": path.resolve().parent})
        except ValidationError as error:
            raise RecipeError(*describe_validation_error(error, cls, str(path))) from None


@dataclass(frozen=True)
class Group:
    """The cells of a study that one recipe holds: all arms with the same changes, at all sizes."""

    variant: str
    metric: str
    remove_blocks: int
    arms: tuple[str, ...]
    data: Mapping[str, Any]
    """The recipe as plain data, without arms."""
    origin: str

    @property
    def name(self) -> str:
        """Such as `mixed-angular_distance-4-sft+sdft`."""
        parts = (self.variant, self.metric, str(self.remove_blocks), "+".join(self.arms))
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Size:
    """How much a study asks for. A cell is one combination of everything but rate and seed."""

    num_recipes: int
    num_cells: int
    num_rate_trainings: int
    """To choose rates."""
    num_seed_trainings: int
    """With the chosen rates, those aside that are among the former."""

    @property
    def num_trainings(self) -> int:
        return self.num_rate_trainings + self.num_seed_trainings


def groups(study: Study) -> list[Group]:
    """The recipes of a study, variants first. Raises `RecipeError` where one cannot be made.

    Arms whose own changes set what an axis varies stand once.
    """
    found = {(group.variant, group.metric, group.remove_blocks, group.arms): group for group in _groups(study)}
    return list(found.values())


def size_of_study(study: Study) -> Size:
    """Raises `RecipeError` when the grid asks for more than the study's budget."""
    recipes = groups(study)
    num_arms = sum(len(group.arms) for group in recipes)
    cells, rated = num_arms * len(study.num_rows), num_arms * len(study.rated_sizes)
    size = Size(len(recipes), cells, rated * len(study.learning_rates), cells * len(study.seeds) - rated)
    most = study.budget.max_trainings
    if most is not None and size.num_trainings > most:
        raise RecipeError(
            f"study {study.name} needs {size.num_trainings:,} trainings, but its budget is {most:,}",
            "list fewer sizes, seeds or learning rates, or raise budget.max_trainings",
        )
    return size


def _groups(study: Study) -> Iterator[Group]:
    base = _present(read_yaml(Path(study.recipe), RecipeError), study.recipe)
    sets: dict[str, tuple[str, ...]] = {}
    for name, arm in study.arms.items():
        key = repr(arm.recipe)
        sets[key] = (*sets.get(key, ()), name)
    for variant, changes in (study.variants or {"": {}}).items():
        varied = laid_over(base, _present(changes, f"study {study.name}"))
        for metric in study.metrics or (None,):
            for blocks in study.remove_blocks or (None,):
                asked = {"metric": metric, "remove_blocks": blocks}
                depth = {"depth": {key: value for key, value in asked.items() if value is not None}}
                for names in sets.values():
                    own = _present(study.arms[names[0]].recipe, f"study {study.name}")
                    data = laid_over(laid_over(varied, depth), own)
                    found = data.get("depth", {})
                    if not isinstance(found.get("remove_blocks"), int):
                        raise RecipeError(
                            f"study {study.name}: the number of blocks to remove is not set, or is not fixed",
                            "set remove_blocks in the study, or depth.remove_blocks to a number in the recipe",
                        )
                    metric_used = found.get("metric", "angular_distance")
                    yield Group(variant, metric_used, found["remove_blocks"], names, data, study.recipe)


def _present(data: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A recipe, or changes to one, by present names, so that one laid over the other replaces a field whatever it is
    called. Raises `RecipeError`."""
    try:
        return with_present_names(Recipe, data)
    except ValueError as reason:
        raise RecipeError(f"{origin}: {reason}", "remove the old name") from None


def rate_recipe(study: Study, group: Group) -> Recipe:
    """Every arm with all rates, at the first seed: what the rates are chosen by."""
    asked = {"learning_rate": study.learning_rates, "seed": study.seeds[0]}
    cells = [(arm, n) for arm, n in _cells(study, group) if n in study.rated_sizes]
    return _recipe(study, group, {arm_name(arm, n): _arm(study, arm, n, **asked) for arm, n in cells})


def seed_recipe(study: Study, group: Group, rates: Mapping[str, float]) -> Recipe:
    """Every arm at every size with its chosen rate, by its name in `rate_recipe`, at every seed."""
    arms = {}
    for arm, n in _cells(study, group):
        rate = rates[arm_name(arm, n if study.rates_at is None else study.rates_at)]
        arms |= {arm_name(arm, n, seed): _arm(study, arm, n, learning_rate=rate, seed=seed) for seed in study.seeds}
    return _recipe(study, group, arms)


def arm_name(arm: str, num_rows: int, seed: int | None = None) -> str:
    """What a recipe of the study calls an arm: `sdft_500`, `sdft_500_s3`."""
    return f"{arm}_{num_rows}" if seed is None else f"{arm}_{num_rows}_s{seed}".replace("-", "m")


def _cells(study: Study, group: Group) -> Iterator[tuple[str, int]]:
    return ((arm, n) for arm in group.arms for n in sorted(study.num_rows, reverse=True))


def _arm(study: Study, name: str, num_rows: int, **asked: Any) -> Changes:
    arm = study.arms[name]
    objective = arm.objective.model_dump(exclude_defaults=True)
    return {"data": arm.data, "num_rows": num_rows, **asked, **({"objective": objective} if objective else {})}


def _recipe(study: Study, group: Group, arms: Changes) -> Recipe:
    data = {**group.data, "name": f"{study.name}-{group.name}"[:80].replace("+", "_")}
    data = {**data, "train": {**data.get("train", {}), "arms": arms}}
    origin = Path(group.origin)
    return Recipe.parse(data, base=origin.resolve().parent, origin=f"study {study.name}, {group.name}")


def laid_over(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `data`: mappings are merged, everything else is replaced. Neither is changed."""
    merged = dict(data)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = laid_over(merged[key], value) if both else value
    return merged
