"""Parts of the recipe that say what is removed from a model, and how small it becomes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic.functional_validators import WrapValidator

from sdft_ray.recipe.yaml_model import StrictPart


def _told(words: str) -> WrapValidator:
    """One sentence about a value that fits none of several types, in place of one error for each type."""

    def check(value: Any, accept: ValidatorFunctionWrapHandler) -> Any:
        try:
            return accept(value)
        except ValidationError:
            raise ValueError(f"give {words}") from None

    return WrapValidator(check)


Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Open = Literal["target"]
"""An amount that the recipe's `target` sets."""
Blocks = Annotated[Count | Open, _told("a number of blocks, at least 1, or target")]
Amount = Annotated[Count | Share | Open, _told("a count of at least 1, a share between 0 and 1, or target")]
Size = Annotated[Count | Share, _told("a count of at least 1, or a share between 0 and 1")]

SPACES = ("hidden", "mlp", "heads", "kv_groups")
"""Channel spaces that can shrink."""


class Depth(StrictPart):
    """Which decoder blocks to remove, and how many. Give the size in exactly one of three ways.

    `remove_blocks`: a number of blocks, at least 1, or `target`: as many as the recipe's target requires.
    `keep_parameters`: a fraction in (0, 1) of the parameters to keep at most. `max_parameters`: a parameter count to
    stay at or under. With `metric: explicit`, `blocks` lists the removed blocks (0-based) and no size is given.
    """

    metric: Literal[
        "angular_distance", "block_influence", "perplexity", "best", "tail", "first", "random", "explicit"
    ] = "angular_distance"
    """`best` compares what the three before it would remove, at every position, by the loss on calibration
    responses."""
    position: Literal["last", "mean"] = "last"
    """Angular distance at the last token (arXiv:2403.17887), or its mean over tokens (steadier on few rows)."""
    drop: Literal["run", "one"] = "run"
    """For `metric: perplexity`. `run`: measure the model without each run of n adjacent blocks, and remove the least
    harmful run. `one`: measure it without each single block, and remove the n least harmful blocks (arXiv:2407.14679,
    section 2.2)."""
    remove_blocks: Blocks | None = None
    keep_parameters: float | None = Field(default=None, gt=0, lt=1)
    max_parameters: int | None = Field(default=None, ge=1)
    blocks: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def is_open(self) -> bool:
        return self.remove_blocks == "target"

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        sizes = [self.remove_blocks, self.keep_parameters, self.max_parameters]
        given = sum(size is not None for size in sizes)
        if self.metric == "explicit":
            if self.blocks is None or given:
                raise ValueError("metric: explicit needs `blocks`, the blocks to remove, and no other size")
        elif self.blocks is not None:
            raise ValueError("`blocks` is only for metric: explicit")
        elif given != 1:
            raise ValueError("give exactly one of remove_blocks, keep_parameters, max_parameters")
        return self


class Width(StrictPart):
    """What to keep of each channel space: a share in (0, 1), a count, or `target`; a space that is not set stays whole.

    `hidden`: channels of the residual stream, one choice for the whole model. `mlp`: channels between the MLP's
    projections. `heads`: query heads, equally many in each key-value group. `kv_groups`: key-value heads, with their
    query heads. The most active are kept (arXiv:2407.14679): |activation| by `over_tokens`, then by `over_sequences`.
    """

    hidden: Amount | None = None
    mlp: Amount | None = None
    heads: Amount | None = None
    kv_groups: Amount | None = None
    multiple_of: int = Field(default=1, ge=1)
    """Shares of `hidden` and `mlp` are rounded down to a multiple of it; counts must be multiples. On GPUs, 64 or 128
    is efficient."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that will share one copy of the pruned model (tensor parallelism). The numbers of heads, key-value groups
    and MLP channels must be divisible by it."""
    over_tokens: Literal["mean", "l2"] = "mean"
    over_sequences: Literal["mean", "l2"] = "l2"

    @property
    def open_spaces(self) -> tuple[str, ...]:
        return tuple(space for space in SPACES if getattr(self, space) == "target")

    @model_validator(mode="after")
    def _names_a_space(self) -> Self:
        if all(getattr(self, space) is None for space in SPACES):
            raise ValueError("nothing to prune: set at least one of hidden, mlp, heads, kv_groups")
        return self


class Target(StrictPart):
    """How large or fast the pruned model must be, in exactly one way; shares are relative to the model before pruning.

    Every amount of `depth` and `width` that says `target` follows from it: the largest model that meets it, with blocks
    and width kept in about equal proportion where both are open, and all open spaces in the same proportion.
    """

    parameters: Size | None = None
    """Maximum number of parameters, as a count or a share."""
    memory_bytes: Size | None = None
    """Maximum memory for the weights and for the KV cache of `batch_rows` sequences of `context_tokens`."""
    speedup: float | None = Field(default=None, gt=1)
    """Minimum decoding speed, as a multiple of that before pruning; measured with the largest batch of `speed`."""
    tokens_per_s: float | None = Field(default=None, gt=0)
    """Minimum decoding speed in tokens per second, measured in the same way."""
    context_tokens: int = Field(default=4096, ge=1)
    batch_rows: int = Field(default=1, ge=1)

    @property
    def is_measured(self) -> bool:
        return self.speedup is not None or self.tokens_per_s is not None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = ("parameters", "memory_bytes", "speedup", "tokens_per_s")
        if sum(getattr(self, way) is not None for way in ways) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}")
        if self.memory_bytes is None and {"context_tokens", "batch_rows"} & self.model_fields_set:
            raise ValueError("context_tokens and batch_rows are only for memory_bytes")
        return self


class Patch(StrictPart):
    """A linear map at every cut that imitates the removed blocks, merged into `down_proj` (arXiv:2505.02819).

    Fitted by least squares on the calibration set, in closed form, before any training.
    """

    ridge: float = Field(default=0.01, gt=0)
    """Regularisation towards a cut without a map, in units of the mean square of the activations that the map reads."""


class Pruning(StrictPart):
    """What one pruning removes; base of a recipe and of each of its earlier steps."""

    depth: Depth = Depth(metric="explicit", blocks=())
    """Without it, all blocks are kept."""
    width: Width | None = None
    target: Target | None = None
    patch: Patch | None = None
    distil_from: Literal["original", "previous"] = "original"
    """The model that arms with a teacher in their objective compare with: the teacher, or the model that this pruning
    starts from. They differ only in a recipe with `steps`."""

    @model_validator(mode="after")
    def _something_is_pruned(self) -> Self:
        if "depth" not in self.model_fields_set and self.width is None:
            raise ValueError("nothing to prune: set depth, width, or both")
        if self.patch and "depth" not in self.model_fields_set:
            raise ValueError("patch replaces removed blocks: set depth, which says which blocks are removed")
        listed = self.depth.blocks
        at_the_start = self.depth.metric == "first" or (listed is not None and set(listed) == set(range(len(listed))))
        if self.patch and at_the_start:
            raise ValueError("patch needs a kept block before a removed one, but depth removes only the first blocks")
        return self

    @model_validator(mode="after")
    def _target_is_used(self) -> Self:
        is_open = self.depth.is_open or bool(self.width and self.width.open_spaces)
        if self.target and not is_open:
            raise ValueError(
                "target has no effect: write `remove_blocks: target` in depth, or `target` for a space in width"
            )
        if is_open and not self.target:
            raise ValueError(
                "depth or width says `target`, but it is missing: add one, such as `target: {parameters: 0.8}`"
            )
        return self
