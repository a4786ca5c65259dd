"""Chooses the decoder blocks to keep. A plan is a value: plans with equal content are equal, whatever their origin.

The channels to keep are chosen in `pruning.width`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, cast

from sdft_ray.errors import PlanError
from sdft_ray.models.channels import WHOLE, Channels, check_channels
from sdft_ray.models.config import check_keep_blocks
from sdft_ray.models.families import Config, family_of, num_blocks_of
from sdft_ray.models.size import size_with_blocks
from sdft_ray.recipe.pruning import Depth


class BlockScores(Protocol):
    """The scores that measured metrics read.

    `angular_*_LN[n - 1][l]` is the angular distance in [0, 1] between the inputs of blocks l and l + n, None
    where l + n > L; `block_influence_L[l]` is 1 - mean cosine of block l's input and output.
    """

    @property
    def angular_last_LN(self) -> Sequence[Sequence[float | None]]: ...
    @property
    def angular_mean_LN(self) -> Sequence[Sequence[float | None]]: ...
    @property
    def block_influence_L(self) -> Sequence[float]: ...


class DropLosses(Protocol):
    """The losses that metric `perplexity` reads, nats per token: without block l, and without n blocks from l on."""

    @property
    def num_removed(self) -> int: ...
    @property
    def one_loss_L(self) -> Sequence[float]: ...
    @property
    def run_loss_S(self) -> Sequence[float]: ...


class SetLosses(Protocol):
    """The losses that metric `best` reads, nats per token: without each of these sets of blocks."""

    @property
    def removed(self) -> Sequence[Sequence[int]]: ...
    @property
    def loss_C(self) -> Sequence[float]: ...


Measured = BlockScores | DropLosses | SetLosses
"""What a metric reads."""


@dataclass(frozen=True)
class PruningPlan:
    """The kept blocks of a model of `num_blocks` blocks (0-based, strictly increasing, at least one), and the kept
    channels.
    """

    model_type: str
    num_blocks: int
    keep_blocks: tuple[int, ...]
    channels: Channels = WHOLE

    def __post_init__(self) -> None:
        check_keep_blocks(self.keep_blocks, self.num_blocks)

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        keep = set(self.keep_blocks)
        return tuple(block for block in range(self.num_blocks) if block not in keep)

    def validate(self, config: Config) -> None:
        """Raise `PlanError` if the plan is for another architecture or shape than that of `config`. No weights."""
        model_type, num_blocks = family_of(config).model_type, num_blocks_of(config)
        if (model_type, num_blocks) != (self.model_type, self.num_blocks):
            raise PlanError(
                f"the plan is for a {self.model_type} of {self.num_blocks} blocks, "
                f"the model is a {model_type} of {num_blocks}",
                "make the plan for this model",
            )
        check_channels(self.channels, config, len(self.keep_blocks))

    def identity(self) -> dict[str, Any]:
        """The content that identifies the plan, with a digest in place of the channels."""
        content = json.loads(self.to_json())
        if "channels" in content:
            text = json.dumps(content.pop("channels"), sort_keys=True)
            content["channels_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return content

    def to_json(self) -> str:
        """One line; equal plans give equal text."""
        content: dict[str, Any] = {
            "keep_blocks": self.keep_blocks,
            "model_type": self.model_type,
            "num_blocks": self.num_blocks,
        }
        channels = self.channels.to_plain()
        return json.dumps({**content, "channels": channels} if channels else content)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of `to_json`. Raises `PlanError` for anything else."""
        wrong = PlanError("not a pruning plan", "a plan has the keys keep_blocks, model_type, num_blocks and channels")
        try:
            content: Any = json.loads(text)
        except ValueError:
            raise wrong from None
        if not isinstance(content, dict):
            raise wrong
        channels = content.pop("channels", {})
        if set(content) != {"keep_blocks", "model_type", "num_blocks"} or not isinstance(channels, dict):
            raise wrong
        blocks = content["keep_blocks"]
        if not isinstance(blocks, list) or not all(type(n) is int for n in (*blocks, content["num_blocks"])):
            raise wrong
        try:
            selection = Channels.from_plain(channels)
        except TypeError:
            raise wrong from None
        return cls(str(content["model_type"]), content["num_blocks"], tuple(blocks), selection)


def choose_blocks(depth: Depth, config: Config, scores: Measured | None = None) -> PruningPlan:
    """The plan for the `depth` of a recipe and a model with this config.

    - `angular_distance`: the n contiguous blocks [l, l + n) with the smallest distance, at the position given in the
      recipe; the first of equals (arXiv:2403.17887, equation 7).
    - `block_influence`: the n blocks with the lowest influence, contiguous or not; the first of equals
      (arXiv:2403.03853).
    - `perplexity`: the n contiguous blocks, or the n single ones, without which the calibration set's loss is lowest
      (arXiv:2407.14679, section 2.2); the first of equals.
    - `best`: of the sets that these metrics propose (`pruning.proposals`) the one without which the loss is lowest; the
      first of equals.
    - `tail`: the last n blocks, the very last included (reverse order, arXiv:2411.15558). The heuristic of
      arXiv:2403.17887, section 4.4, differs: it keeps the last block; use `explicit` for it.
    - `first`: the first n blocks, a lower bound: without block 0 a model does not work.
    - `random`: a seeded simple random sample of n blocks, any of them, contiguous or not. For one seed the
      samples are nested: a larger n removes the same blocks and more.
    - `explicit`: exactly the listed blocks; an empty list keeps all.

    Raises `PlanError` if no block would be kept, if the target cannot be met, or if the scores are of another model.
    """
    num_blocks = num_blocks_of(config)
    removed = _explicit(depth, num_blocks) if depth.metric == "explicit" else _chosen(depth, config, scores)
    keep = tuple(block for block in range(num_blocks) if block not in removed)
    return PruningPlan(family_of(config).model_type, num_blocks, keep)


def resolve_num_removed(depth: Depth, config: Config) -> int:
    """Number of blocks that `depth` removes: as given, or the fewest that reduce the model to the target size.

    Raises `PlanError` if no block would be kept, if even one block is too large (with the smallest reachable size),
    or if the unpruned model meets the target.
    """
    num_blocks = num_blocks_of(config)
    if depth.metric == "explicit":
        return len(_explicit(depth, num_blocks))
    assert depth.remove_blocks != "target", "open amounts are resolved earlier: see `pruning.target`"
    if depth.remove_blocks is not None:
        if depth.remove_blocks >= num_blocks:
            raise PlanError(
                f"cannot remove {depth.remove_blocks} of {num_blocks} blocks",
                f"remove at most {num_blocks - 1}",
            )
        return depth.remove_blocks
    full = size_with_blocks(config, num_blocks).num_parameters
    if depth.keep_parameters is not None:  # exact: 0.7 means 7/10
        target = math.floor(Fraction(str(depth.keep_parameters)) * full)
    else:
        assert depth.max_parameters is not None, "a Depth names its size in one of three ways"
        target = depth.max_parameters
    if target >= full:
        raise PlanError(
            f"the model has {full:,} parameters, no more than the target of {target:,}",
            "give a smaller target",
        )
    return _fewest_removed(config, num_blocks, target)


def _fewest_removed(config: Config, num_blocks: int, target: int) -> int:
    for num_removed in range(1, num_blocks):
        if size_with_blocks(config, num_blocks - num_removed).num_parameters <= target:
            return num_removed
    smallest = size_with_blocks(config, 1).num_parameters
    raise PlanError(
        f"no number of removed blocks reaches the target of {target:,} parameters",
        f"the smallest reachable size is {smallest:,}, with 1 of {num_blocks} blocks",
    )


def _explicit(depth: Depth, num_blocks: int) -> set[int]:
    assert depth.blocks is not None, "metric explicit goes with blocks"
    removed = set(depth.blocks)
    if len(removed) != len(depth.blocks):
        raise PlanError("depth.blocks lists a block twice", "list every block to remove once")
    strays = sorted(block for block in removed if not 0 <= block < num_blocks)
    if strays:
        raise PlanError(f"there is no block {strays[0]}", f"the model has blocks 0 to {num_blocks - 1}")
    if len(removed) == num_blocks:
        raise PlanError(f"cannot remove {num_blocks} of {num_blocks} blocks", f"remove at most {num_blocks - 1}")
    return removed


def _chosen(depth: Depth, config: Config, scores: Measured | None) -> set[int]:
    num_blocks, num_removed = num_blocks_of(config), resolve_num_removed(depth, config)
    if depth.metric == "tail":
        return set(range(num_blocks - num_removed, num_blocks))
    if depth.metric == "first":
        return set(range(num_removed))
    if depth.metric == "random":
        return set(_shuffled(num_blocks, depth.seed)[:num_removed])
    assert scores is not None, f"metric {depth.metric} needs scores"
    if depth.metric == "perplexity":
        return _least_missed(depth, cast(DropLosses, scores), num_blocks, num_removed)
    if depth.metric == "best":
        return _best(cast(SetLosses, scores), num_removed)
    scores = cast(BlockScores, scores)
    _check_scores(scores, num_blocks)
    if depth.metric == "block_influence":
        return set(_lowest(scores.block_influence_L, num_removed))
    matrix = scores.angular_last_LN if depth.position == "last" else scores.angular_mean_LN
    distances = matrix[num_removed - 1][: num_blocks - num_removed + 1]
    (start,) = _lowest([math.inf if distance is None else distance for distance in distances], 1)
    return set(range(start, start + num_removed))


def _least_missed(depth: Depth, losses: DropLosses, num_blocks: int, num_removed: int) -> set[int]:
    if len(losses.one_loss_L) != num_blocks or losses.num_removed != num_removed:
        raise PlanError(
            f"the losses are of {len(losses.one_loss_L)} blocks with {losses.num_removed} removed, the plan is for "
            f"{num_blocks} with {num_removed} removed",
            "measure this model",
        )
    if depth.drop == "one":
        return set(_lowest(losses.one_loss_L, num_removed))
    (start,) = _lowest(losses.run_loss_S, 1)
    return set(range(start, start + num_removed))


def _best(losses: SetLosses, num_removed: int) -> set[int]:
    candidates = {number: set(blocks) for number, blocks in enumerate(losses.removed) if blocks}
    if not candidates or {len(blocks) for blocks in candidates.values()} != {num_removed}:
        raise PlanError(f"the losses are not those without {num_removed} blocks", "measure this model")
    return candidates[min(candidates, key=lambda number: (losses.loss_C[number], number))]


def _lowest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (values[index], index))[:count]


def _shuffled(num_blocks: int, seed: int) -> list[int]:
    """All blocks, ordered by hashes: the same order on every platform and Python version."""
    return sorted(range(num_blocks), key=lambda block: hashlib.sha256(f"{seed}:{block}".encode()).digest())


def _check_scores(scores: BlockScores, num_blocks: int) -> None:
    """Raise `PlanError` unless the scores are finite and of a model with this many blocks."""
    complete = all(
        len(matrix) == num_blocks - 1 and all(len(row) >= num_blocks - n for n, row in enumerate(matrix))
        for matrix in (scores.angular_last_LN, scores.angular_mean_LN)
    )
    if len(scores.block_influence_L) != num_blocks or not complete:
        raise PlanError(
            f"the scores cover {len(scores.block_influence_L)} blocks, the model has {num_blocks}",
            "measure this model",
        )
    needed = [row[: num_blocks - n] for n, row in enumerate(scores.angular_last_LN)]
    needed += [row[: num_blocks - n] for n, row in enumerate(scores.angular_mean_LN)]
    needed.append(scores.block_influence_L)
    if any(value is None or not math.isfinite(value) for row in needed for value in row):
        raise PlanError("the scores have values that are not finite", "measure again, in bfloat16 or float32")
