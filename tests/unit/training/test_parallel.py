"""Several ranks train like one: threads that add up in memory, and two real processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.errors import RecipeError
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.loop import StepRecord, TrainPlan, _Checkpoints, train
from sdft_ray.training.losses import Teacher
from sdft_ray.training.parallel import Parallel, Single
from sdft_ray.training.schedule import Precision
from sdft_ray.training.state import TrainState, load_state, save_state
from sdft_ray.training.weights import Weights
from tests.support.tiny import build_model

PLAN = TrainPlan(
    num_steps=2,
    rows_per_step=3,
    learning_rate=1e-3,
    micro_batch_rows=1,
    checkpoint_every=1,
    objective=Objective(forward_kl=0.5),
)

WORKER = """
import sys
from pathlib import Path
import torch.distributed as dist
from sdft_ray.data.packing import PackedRows
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.loop import TrainPlan, train
from sdft_ray.training.losses import Teacher
from sdft_ray.training.parallel import ReplicatedParallel
from sdft_ray.training.state import save_state
from tests.support.tiny import build_model

here, rank, plan = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{here}/meeting", rank=rank, world_size=2)
rows = PackedRows.load(here / "rows.arrow")
model = build_model("llama", num_blocks=2, seed=rank)  # rank 1 starts wrong: rank 0's weights are used
teacher = Teacher(build_model("llama", num_blocks=3, seed=7))
save = lambda state: save_state(here / f"rank{rank}" / str(state.step), state)
train(model, rows, plan, teacher=teacher, parallel=ReplicatedParallel(), save=save)
dist.destroy_process_group()
"""


class Threads:
    """Ranks that are threads of this process."""

    share = (0, 1)

    def __init__(self, rank: int, shared: list[Any], barrier: Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def _gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait()
        values = list(self._shared)
        self._barrier.wait()
        return values

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self._gather(tensor.clone())).sum(0))

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(self._gather(tensor.clone())[0])

    def weights(self, model: Any, precision: Precision) -> Weights:
        return Weights(model, precision)


@pytest.fixture
def rows() -> PackedRows:
    """Rows with unequal numbers of response tokens, so that a mean of means would show."""
    lengths = [16, 16, 15, 9, 4, 3]
    return pack([Document([(11 * n + i) % 128 for i in range(n)], [i >= 2 for i in range(n)]) for n in lengths], 16)


def run(rows: PackedRows, parallel: Parallel, directory: Path, seed: int = 0) -> list[StepRecord]:
    records: list[StepRecord] = []
    train(
        build_model("llama", num_blocks=2, seed=seed),
        rows,
        PLAN,
        teacher=Teacher(build_model("llama", num_blocks=3, seed=7)),
        parallel=parallel,
        report=records.append,
        save=lambda state: save_state(directory / str(state.step), state),
    )
    return records


def assert_same_training(alone: Path, ranks: list[Path]) -> None:
    """Equal first moments of the gradient, up to rounding; equal weights on all ranks, to the bit."""
    for step in range(1, PLAN.num_steps + 1):
        expected = load_state(alone / str(step))
        found: list[TrainState] = [load_state(rank / str(step)) for rank in ranks]
        for name, kept in expected.optimizer.items():
            torch.testing.assert_close(found[0].optimizer[name]["exp_avg"], kept["exp_avg"], rtol=1e-3, atol=1e-6)
            assert all(torch.equal(other.weights[name], found[0].weights[name]) for other in found)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])  # with four, one rank has no row
def test_ranks_train_like_one(rows: PackedRows, world_size: int, tmp_path: Path):
    barrier, shared = Barrier(world_size, timeout=200), [None] * world_size
    expected = run(rows, Single(), tmp_path / "alone")
    directories = [tmp_path / f"rank{rank}" for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        parts = [
            pool.submit(run, rows, Threads(rank, shared, barrier), directory, seed=rank)
            for rank, directory in enumerate(directories)
        ]
        records = [part.result() for part in parts]
    for of_rank in records:
        assert [r.loss for r in of_rank] == pytest.approx([r.loss for r in expected], rel=1e-5)
        for found, wanted in zip(of_rank, expected, strict=True):
            assert found.terms == pytest.approx(wanted.terms, rel=1e-5)
            assert set(found.terms) == {"cross_entropy", "forward_kl"}
        assert [r.grad_norm for r in of_rank] == [r.grad_norm for r in records[0]]
        assert [r.num_loss_tokens for r in of_rank] == [r.num_loss_tokens for r in expected]
    assert_same_training(tmp_path / "alone", directories)


@pytest.mark.parametrize("is_due", [True, False])
def test_the_clock_of_the_first_rank_decides_for_all(is_due: bool):
    barrier, shared = Barrier(2, timeout=60), [None] * 2
    plan = replace(PLAN, checkpoint_every=0, checkpoint_every_s=100.0)

    def ask(rank: int) -> bool:
        checkpoints = _Checkpoints(plan, Threads(rank, shared, barrier), torch.device("cpu"))
        if (rank == 0) == is_due:
            checkpoints._since_s -= 1000.0
        return checkpoints.is_due(1)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [is_due, is_due]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(rows: PackedRows, before: int, after: int, tmp_path: Path):
    plan = replace(PLAN, num_steps=6, checkpoint_every=3)

    def ranks(world_size: int, resume: TrainState | None) -> list[StepRecord]:
        barrier, shared = Barrier(world_size, timeout=200), [None] * world_size

        def one(rank: int) -> list[StepRecord]:
            records: list[StepRecord] = []
            train(
                build_model("llama", num_blocks=2, seed=rank),
                rows,
                plan,
                teacher=Teacher(build_model("llama", num_blocks=3, seed=7)),
                parallel=Threads(rank, shared, barrier),
                report=records.append,
                save=lambda state: save_state(tmp_path / f"{world_size}-{rank}-{state.step}", state),
                resume=resume,
            )
            return records

        with ThreadPoolExecutor(world_size) as pool:
            parts = [pool.submit(one, rank) for rank in range(world_size)]
            first, *_ = [part.result() for part in parts]
            return first

    whole = ranks(before, None)
    rest = ranks(after, load_state(tmp_path / f"{before}-0-3"))
    assert [r.step for r in rest] == [4, 5, 6]
    assert [r.loss for r in rest] == pytest.approx([r.loss for r in whole[3:]], abs=1e-5)


def test_every_rank_names_the_row_of_one(tmp_path: Path):
    rows = pack([Document([20 + i] * 16, [False] * 5 + [True] * 11) for i in range(3)], 16)
    barrier, shared = Barrier(2, timeout=200), [None] * 2

    def one(rank: int) -> str:
        model: Any = build_model("llama", num_blocks=2, tied=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[21] = float("nan")
        plan = replace(PLAN, objective=Objective())
        with pytest.raises(RecipeError) as caught:
            train(model, rows, plan, parallel=Threads(rank, shared, barrier), name_of=lambda index: f"id{index}")
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        told = [part.result() for part in [pool.submit(one, rank) for rank in range(2)]]
    assert told[0] == told[1]
    assert "packed rows 1, which hold id1 " in told[0]


@pytest.mark.slow
def test_two_processes_train_like_one(rows: PackedRows, tmp_path: Path):
    rows.save(tmp_path / "rows.arrow")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank), repr(PLAN)],
            cwd=Path(__file__).parents[3],
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        run(rows, Single(), tmp_path / "alone")
        assert [worker.wait(timeout=280) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert_same_training(tmp_path / "alone", [tmp_path / "rank0", tmp_path / "rank1"])
