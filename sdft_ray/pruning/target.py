"""Resolves a target into amounts: the largest model that meets it, with depth and width pruned in proportion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import config_with_sizes
from sdft_ray.models.families import Config, family_of, num_blocks_of
from sdft_ray.models.size import ModelSize, size_with_blocks
from sdft_ray.pruning.plan import resolve_num_removed
from sdft_ray.pruning.width import members, resolve_sizes
from sdft_ray.recipe.pruning import Depth, Pruning, Target, Width

_NUM_SHARES = 1024
"""Number of candidate shares of the open spaces, evenly over (0, 1)."""


@dataclass(frozen=True)
class Candidate:
    """A model within the open amounts of a recipe. `shares`: its fractions of blocks and of parameters per block."""

    num_blocks: int
    sizes: Mapping[str, int]
    size: ModelSize
    shares: tuple[float, float]

    @property
    def imbalance(self) -> float:
        """0 if depth and width are reduced in the same proportion."""
        depth, width = self.shares
        return abs(math.log(depth / width))

    def amounts(self, depth: Depth, width: Width | None, config: Config) -> tuple[Depth, Width | None]:
        """`depth` and `width` with the numbers of this candidate in place of the open ones."""
        if depth.is_open:
            removed = num_blocks_of(config) - self.num_blocks
            nothing = Depth(metric="explicit", blocks=())
            depth = depth.model_copy(update={"remove_blocks": removed}) if removed else nothing
        if width is not None and width.open_spaces:
            width = width.model_copy(update={space: self.sizes[space] for space in width.open_spaces})
        return depth, width


def resolve_target(pruning: Pruning, config: Config, *, dtype: str) -> tuple[Depth, Width | None]:
    """The `depth` and `width` of a recipe for a model with this config, with numbers for all open amounts.

    For every number of blocks, the largest model that meets the target is a candidate; the candidate with the smallest
    imbalance is chosen. `dtype` is that of the weights, for targets in bytes.

    Raises `PlanError` if nothing meets the target (with the nearest models), if the unpruned model meets it, and for a
    target that has to be measured first (`rate`).
    """
    target = pruning.target
    if target is None:
        return pruning.depth, pruning.width
    if target.is_measured:
        raise PlanError("the size for a target in speed is known only after a measurement", "run the recipe")
    allowed = candidates(pruning.depth, pruning.width, config, dtype=dtype)
    counted = _counted(target)
    full = counted(size_with_blocks(config, num_blocks_of(config), dtype=dtype))
    bound = _bound(target, full)
    if bound >= full:
        raise PlanError(f"the model has {_amount(target, full)}, no more than the target", "give a smaller target")
    return _largest(allowed, lambda candidate: counted(candidate.size) <= bound, target, bound, counted).amounts(
        pruning.depth, pruning.width, config
    )


def candidates(depth: Depth, width: Width | None, config: Config, *, dtype: str) -> list[Candidate]:
    """All models within the open amounts, by blocks, then by size, ascending. Raises `PlanError` if there is none."""
    num_blocks = num_blocks_of(config)
    depths = range(1, num_blocks + 1) if depth.is_open else [num_blocks - resolve_num_removed(depth, config)]
    widths = _widths(width, config)
    whole = _block_parameters(config)
    results = []
    for sizes in widths:
        narrow = config_with_sizes(config, sizes)
        # A fixed width is not a reason to remove blocks in proportion.
        share = _block_parameters(narrow) / whole if width and width.open_spaces else 1.0
        results += [
            Candidate(n, sizes, size_with_blocks(narrow, n, dtype=dtype), (n / num_blocks, share)) for n in depths
        ]
    return sorted(results, key=lambda candidate: (candidate.num_blocks, candidate.size.num_parameters))


def path(depth: Depth, width: Width | None, config: Config, *, dtype: str) -> list[Candidate]:
    """Candidates with decreasing numbers of parameters, each with the smallest imbalance for its size; the search space
    for a target in speed."""
    allowed = candidates(depth, width, config, dtype=dtype)
    full = size_with_blocks(config, num_blocks_of(config)).num_parameters
    chosen: list[Candidate] = []
    for percent in range(98, 0, -2):
        bound = percent * full // 100
        fitting = [candidate for candidate in allowed if candidate.size.num_parameters <= bound]
        if not fitting:
            break
        best = _best(fitting)
        if not chosen or best.size.num_parameters < chosen[-1].size.num_parameters:
            chosen.append(best)
    return chosen


def first_that_meets(
    descending: Sequence[Candidate], meets: Callable[[Candidate], bool], told: Callable[[], str]
) -> Candidate:
    """The first candidate that meets a target which every later one meets too, by binary search.

    Raises `PlanError` with what `told` gives when the last does not.
    """
    low, high = 0, len(descending)
    while low < high:
        middle = (low + high) // 2
        if meets(descending[middle]):
            high = middle
        else:
            low = middle + 1
    if low == len(descending):
        raise PlanError("no model that the recipe allows is fast enough", f"nearest: {told()}")
    return descending[low]


def _widths(width: Width | None, config: Config) -> list[Mapping[str, int]]:
    """Sizes of all spaces, one entry per loadable width."""
    if width is None or not width.open_spaces:
        return [resolve_sizes(width, config)]
    results: list[Mapping[str, int]] = []
    refusal: PlanError | None = None
    most_heads = _share_of_groups(width, config)
    for share in (*_shares(config), None):
        update = dict.fromkeys(width.open_spaces, share)
        if "heads" in update and share is not None:
            update["heads"] = min(share, most_heads)
        try:
            sizes = resolve_sizes(width.model_copy(update=update), config)
        except PlanError as error:
            refusal = error
            continue
        if sizes not in results[-1:]:
            results.append(sizes)
    if refusal is not None and not results:
        raise refusal
    return results


def _shares(config: Config) -> list[float]:
    """Shares evenly over (0, 1), and those of whole heads and groups, slightly larger, as shares round down."""
    sizes = family_of(config).space_sizes(config)
    even = {part / _NUM_SHARES for part in range(1, _NUM_SHARES)}
    heads = {math.nextafter(n / sizes[s], 1.0) for s in ("heads", "kv_groups") for n in range(1, sizes[s])}
    return sorted(even | heads)


def _share_of_groups(width: Width, config: Config) -> float:
    """The share of all heads if the recipe fixes the key-value groups, slightly larger, because shares round down."""
    if width.kv_groups is None or width.kv_groups == "target":
        return 1.0
    num_groups = family_of(config).space_sizes(config)["kv_groups"]
    return math.nextafter(members(width.kv_groups, num_groups) / num_groups, 1.0)


def _block_parameters(config: Config) -> int:
    return size_with_blocks(config, 2).num_parameters - size_with_blocks(config, 1).num_parameters


def _best(fitting: list[Candidate]) -> Candidate:
    """Of the largest model for each number of blocks, the one with the smallest imbalance."""
    largest = {candidate.num_blocks: candidate for candidate in fitting}  # ascending: the last one is kept
    return min(largest.values(), key=lambda candidate: (round(candidate.imbalance, 9), -candidate.size.num_parameters))


def _largest(
    allowed: list[Candidate],
    meets: Callable[[Candidate], bool],
    target: Target,
    bound: int,
    counted: Callable[[ModelSize], int],
) -> Candidate:
    fitting = [candidate for candidate in allowed if meets(candidate)]
    if fitting:
        return _best(fitting)
    nearest = sorted(allowed, key=lambda candidate: counted(candidate.size))[:3]
    options = "; ".join(f"{_amount(target, counted(near.size))} with {describe(near)}" for near in nearest)
    raise PlanError(
        f"no model that the recipe allows meets the target of {_amount(target, bound)}", f"nearest: {options}"
    )


def describe(candidate: Candidate) -> str:
    """`6 blocks, hidden 96, mlp 240`."""
    spaces = ", ".join(f"{space} {candidate.sizes[space]}" for space in ("hidden", "mlp", "heads", "kv_groups"))
    return f"{candidate.num_blocks} blocks, {spaces}"


def _counted(target: Target) -> Callable[[ModelSize], int]:
    """The function from a size to the quantity that the target limits."""
    if target.parameters is not None:
        return lambda size: size.num_parameters
    cached_tokens = target.context_tokens * target.batch_rows
    return lambda size: size.weight_bytes + size.kv_bytes_per_token * cached_tokens


def _bound(target: Target, full: int) -> int:
    limit = target.parameters if target.parameters is not None else target.memory_bytes
    assert limit is not None, "a target that is not measured names parameters or bytes"
    return math.floor(Fraction(str(limit)) * full) if isinstance(limit, float) else limit


def _amount(target: Target, amount: int) -> str:
    return f"{amount:,} {'parameters' if target.parameters is not None else 'bytes'}"
