"""`compress`: walk the graph, reuse what is committed, run the rest side by side, and point a name at the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sdft_ray.errors import StoreError
from sdft_ray.pipeline.preflight import check_tasks, preflight
from sdft_ray.pipeline.run import Run
from sdft_ray.pipeline.scheduler import GraphRun, run_missing
from sdft_ray.progress import libraries_to, open_run_view, teller
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.graph import removal_step, steps
from sdft_ray.store.store import Store


def compress(
    recipe: Recipe,
    store: str | Store = ".sdft",
    resources: Resources | None = None,
    *,
    name: str | None = None,
    view: Literal["auto", "live", "plain", "json", "none"] = "auto",
) -> Run:
    """Make everything that the recipe asks for and is not yet in the store; return the run.

    Steps run side by side as far as the cluster holds them. Interrupted at any time, the store stays sound, and
    the next call continues. Raises `UserError` before any worker starts when recipe, data, models, store or
    resources cannot work, and `StageError` when a stage fails while it runs.
    """
    store = store if isinstance(store, Store) else Store(store)
    resources = resources or Resources()
    store.check_writable()
    walk = GraphRun(recipe, store, resources, name or recipe.name, steps(recipe))
    with libraries_to(walk.log):  # a hub's client may have something to say
        walk.refresh()
    with open_run_view(view, [step.name for step in walk.steps], walk.log) as shown:
        walk.show_reused(shown.handle)
        if walk.missing():
            preflight(recipe, store, resources, walk.states, walk.teacher, tell=teller(shown.handle))
            planned = walk.plan_memory(teller(shown.handle))
            run_missing([walk], planned.resources, shown.handle, walk.log, planned.budget_bytes)
    return walk.finish()


def retry(
    name: str,
    store: str | Store = ".sdft",
    resources: Resources | None = None,
    *,
    view: Literal["auto", "live", "plain", "json", "none"] = "auto",
) -> Run:
    """Ask the teacher again for the rows of a run that failed, and make anew what depends on them.

    All other rows are taken over. Nothing happens when none failed. Raises `StoreError` for an unknown run, and as
    `compress` does.
    """
    store = store if isinstance(store, Store) else Store(store)
    run = Run.open(store, name)
    if not run.manifests["generate"].summary["num_failed"]:
        return run
    asked = run.recipe.generate
    again = asked.model_copy(update={"attempt": asked.attempt + 1})
    return compress(run.recipe.model_copy(update={"generate": again}), store, resources, name=name, view=view)


def block_removal_scores(
    run: Run,
    removals: Sequence[Sequence[int]],
    resources: Resources | None = None,
    *,
    limit: int | None = None,
    view: Literal["auto", "live", "plain", "json", "none"] = "auto",
) -> list[dict[str, Any]]:
    """Scores by task of the model that a run's (last) pruning starts from, without each of `removals`.

    A removal is a list of blocks, empty for the whole model; `limit` items of a task are asked, None for what the
    recipe asks. What was asked before is taken from the store. A score is a mapping of value, stderr and n. Raises as
    `compress`.
    """
    resources, store = resources or Resources(), run.store
    evaluate = run.recipe.evaluate if limit is None else run.recipe.evaluate.model_copy(update={"limit": limit})
    recipe = run.recipe.model_copy(update={"evaluate": evaluate})
    asked = [removal_step(recipe, blocks) for blocks in removals]
    # Asked in another way, the seed set could count as another one; nothing above `why` does.
    known = [*steps(run.recipe), *asked]
    walk = GraphRun(recipe, store, resources, run.name, known, frozenset(step.name for step in asked))
    with libraries_to(walk.log):  # a hub's client may have something to say
        walk.refresh()
    if walk.states["plan"].address != run.manifests["plan"].address:
        raise StoreError(
            f"the teacher or the data of run {run.name} have changed since that run",
            "restore them, or run the recipe again",
        )
    with open_run_view(view, sorted(walk.wanted or ()), walk.log) as shown:
        if walk.missing():
            store.check_writable()
            check_tasks(recipe)
            planned = walk.plan_memory(teller(shown.handle))
            run_missing([walk], planned.resources, shown.handle, walk.log, planned.budget_bytes)
    found = [walk.states[step.name].manifest for step in asked]
    return [manifest.summary["scores"] for manifest in found if manifest is not None]
