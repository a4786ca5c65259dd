"""`run_step`: one step of a recipe, and the steps that it needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sdft_ray.errors import RecipeError
from sdft_ray.pipeline.preflight import preflight
from sdft_ray.pipeline.scheduler import GraphRun, run_missing
from sdft_ray.progress import ViewName, libraries_to, open_run_view, teller
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import State, Step, steps
from sdft_ray.store.store import Store


def run_step(
    recipe: Recipe, name: str, store: Store, resources: Resources | None = None, *, view: ViewName = "auto"
) -> dict[str, State]:
    """Run one step (`generate`, `train:ARM`), or all steps of a stage (`train`), and every step that they need.

    Steps that are in the store are reused. Returns the states of these steps by name, in the order of the recipe; all
    are done. No run is recorded. Raises as `compress`, and `RecipeError` for a name that the recipe does not have.
    """
    resources = resources or Resources()
    known = steps(recipe)
    names = {step.name for step in known if step.name == name} or {step.name for step in known if step.stage == name}
    if not names:
        raise RecipeError(f"recipe {recipe.name} has no step {name!r}", f"it has {', '.join(s.name for s in known)}")
    store.check_writable()
    walk = GraphRun(recipe, store, resources, recipe.name, known, needed_steps(known, names))
    with libraries_to(walk.log):  # a hub's client may have something to say
        walk.refresh()
    with open_run_view(view, walk.steps_wanted(), walk.log) as shown:
        walk.show_reused(shown.handle)
        if walk.missing():
            preflight(recipe, store, resources, walk.states, tell=teller(shown.handle))
            planned = walk.plan_memory(teller(shown.handle))
            run_missing([walk], planned.resources, shown.handle, walk.log, planned.budget_bytes)
    return {step: walk.states[step] for step in walk.steps_wanted()}


def needed_steps(known: Sequence[Step], names: Collection[str]) -> frozenset[str]:
    """The names of the steps called `names` and of all steps that they depend on."""
    needed = set(names)
    for step in reversed(known):
        if step.name in needed:
            needed |= set(step.inputs.values())
    return frozenset(needed)
