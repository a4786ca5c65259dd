"""Where a speed is looked for: ever smaller models, few of which are asked."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.errors import PlanError
from sdft_ray.models.size import ModelSize, size_of
from sdft_ray.pruning.target import Candidate, first_that_meets, path
from sdft_ray.recipe.pruning import Depth, Width
from tests.support.counted_models import CASES, NONE_GOES, OPEN, QWEN3, sizes_of


@pytest.mark.parametrize(("config", "spaces", "multiple_of"), CASES)
@pytest.mark.parametrize("depth", [OPEN, NONE_GOES])
def test_a_path_goes_down(depth: Depth, config: dict[str, Any], spaces: tuple[str, ...], multiple_of: int) -> None:
    width = Width.model_validate({**dict.fromkeys(spaces, "target"), "multiple_of": multiple_of})
    found = path(depth, width, config, dtype="float32")
    counts = [candidate.size.num_parameters for candidate in found]
    assert counts
    assert counts[0] <= 0.98 * size_of(config).num_parameters
    assert all(later < earlier for earlier, later in pairwise(counts))


@pytest.mark.parametrize(("num_blocks", "multiple_of"), [(1, 1), (2, 1), (3, 8), (5, 4), (9, 1)])
def test_a_path_goes_down_for_any_number_of_blocks(num_blocks: int, multiple_of: int) -> None:
    """In coarse steps, the best in proportion for a lower bound can be larger than the best for a higher one."""
    config = {**QWEN3, "num_hidden_layers": num_blocks}
    for width in (
        Width(hidden="target", multiple_of=multiple_of),
        Width(hidden="target", mlp="target", multiple_of=multiple_of),
    ):
        counts = [candidate.size.num_parameters for candidate in path(OPEN, width, config, dtype="float32")]
        assert counts == sorted(set(counts), reverse=True)


def test_a_path_of_depth_alone_loses_block_after_block() -> None:
    found = path(OPEN, None, QWEN3, dtype="float32")
    assert [candidate.num_blocks for candidate in found] == [5, 4, 3, 2, 1]


def test_a_path_beside_a_fixed_width_begins_with_all_blocks() -> None:
    found = path(OPEN, Width(mlp=0.5), QWEN3, dtype="float32")
    assert [candidate.num_blocks for candidate in found] == [6, 5, 4, 3, 2, 1]


def test_a_path_names_no_model_twice() -> None:
    found = path(OPEN, Width(hidden="target", mlp="target"), QWEN3, dtype="float32")
    shown = [(candidate.num_blocks, sizes_of(candidate)) for candidate in found]
    assert len(set(shown)) == len(shown) > 20


def models(count: int) -> list[Candidate]:
    return [Candidate(n, {}, ModelSize(n, n, n, n, n), (1.0, 1.0)) for n in range(count, 0, -1)]


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_the_first_that_meets_is_found_by_few_questions(count: int, data: st.DataObject) -> None:
    descending, first = models(count), data.draw(st.integers(0, count - 1))
    asked: list[int] = []

    def meets(candidate: Candidate) -> bool:
        asked.append(candidate.num_blocks)
        return candidate.num_blocks <= descending[first].num_blocks

    assert first_that_meets(descending, meets, lambda: "") is descending[first]
    assert len(asked) == len(set(asked)) <= math.ceil(math.log2(count)) + 1


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100))
def test_none_that_meets_is_answered_by_what_was_seen(count: int) -> None:
    asked: list[int] = []

    def never(candidate: Candidate) -> bool:
        asked.append(candidate.num_blocks)
        return False

    with pytest.raises(PlanError, match="no model that the recipe allows is fast enough") as caught:
        first_that_meets(models(count), never, lambda: f"after {len(asked)}")
    assert caught.value.hint == f"nearest: after {len(asked)}"
    assert asked[-1:] == ([1] if count else [])  # the smallest was asked before giving up
