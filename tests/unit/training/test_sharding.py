"""FSDP2 over real processes trains like DDP and like one process, and continues what any of them began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdft_ray.training.parallel import Single, local_group
from sdft_ray.training.sharding import ShardedParallel
from sdft_ray.training.state import load_state
from tests.support.fork_server import ForkServer
from tests.unit.training.ranks import CASES, PLAN, ranks, run, student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WAIT_S = 400


@pytest.fixture(scope="module")
def folder(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases by one process, by two with both strategies, and one case by three."""
    folder = tmp_path_factory.mktemp("ranks")
    run(CASES["all"], Single(), folder, strategy="alone", name="all")  # the ranks continue it
    with ranks(folder, 2, forks.python) as two:
        for name, case in CASES.items():
            run(case, Single(), folder, strategy="alone", name=name)
        assert [process.wait(timeout=WAIT_S) for process in two] == [0, 0]
    with ranks(folder, 3, forks.python) as three:
        assert [process.wait(timeout=WAIT_S) for process in three] == [0, 0, 0]
    return folder


def records(folder: Path, strategy: str, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / strategy / name / "records.json").read_text(encoding="utf-8"))


def model(folder: Path, strategy: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / strategy / name / "model.safetensors")


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=rel)
        assert one["terms"] == pytest.approx(other["terms"], rel=rel)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * rel)
        assert one["num_loss_tokens"] == other["num_loss_tokens"]


@pytest.mark.parametrize("name", CASES)
def test_shards_train_like_copies_and_like_one_process(folder: Path, name: str):
    """Loss, gradient norm before clipping, and the first gradient itself, which AdamW's first moment holds."""
    bf16 = CASES[name].plan.precision == "bf16"
    rel = 2e-2 if bf16 else 1e-5
    found = records(folder, "fsdp", name)
    assert len(found) == PLAN.num_steps
    assert_same_curve(found, records(folder, "ddp", name), 1e-3 if bf16 else 1e-5)
    assert_same_curve(found, records(folder, "alone", name), rel)
    one, other = (load_state(folder / strategy / name / "1") for strategy in ("fsdp", "alone"))
    assert one.optimizer.keys() == other.optimizer.keys()
    for key, kept in other.optimizer.items():
        scale = kept["exp_avg"].abs().max().item()
        torch.testing.assert_close(
            one.optimizer[key]["exp_avg"], kept["exp_avg"], rtol=0, atol=scale * (0.1 if bf16 else 1e-4) + 1e-12
        )


def test_the_cases_differ(folder: Path):
    """Or else they would prove one thing many times. Those that only change the way are equal to `all`."""
    curves = {name: tuple(record["loss"] for record in records(folder, "alone", name)) for name in CASES}
    same = {"recomputed", "not resharded", "reduced at once"}
    assert len(set(curves.values())) == len(CASES) - len(same)
    assert records(folder, "alone", "clipped")[0]["grad_norm"] > CASES["clipped"].plan.clip_norm


def test_dropout_is_drawn_as_in_copies(folder: Path):
    assert_same_curve(records(folder, "fsdp", "dropout"), records(folder, "ddp", "dropout"), 1e-5)
    assert records(folder, "fsdp", "dropout") != records(folder, "fsdp", "lora")


@pytest.mark.parametrize("name", CASES)
def test_rank_0_gets_the_whole_model_back_in_its_dtypes(folder: Path, name: str):
    found, before = model(folder, "fsdp", name), student(CASES[name])
    trained = load_state(folder / "fsdp" / name / str(PLAN.num_steps)).weights
    assert found.keys() == dict(before.named_parameters()).keys()
    for key, param in before.named_parameters():
        assert found[key].dtype == param.dtype
        assert torch.equal(found[key], trained[key].to(param.dtype) if param.requires_grad else param), key
    assert any(not torch.equal(found[key], p) for key, p in before.named_parameters())


@pytest.mark.parametrize("name", ["all", "bf16", "dropout"])
def test_an_interrupted_run_ends_bit_equal(folder: Path, name: str):
    whole, resumed = records(folder, "fsdp", name), records(folder, "fsdp resumed", name)
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in resumed] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in whole[2:]
    ]
    expected = model(folder, "fsdp", name)
    assert all(torch.equal(value, expected[key]) for key, value in model(folder, "fsdp resumed", name).items())


@pytest.mark.parametrize("strategy", ["alone to fsdp", "ddp to fsdp", "fsdp to ddp", "whole to fsdp", "two to three"])
def test_another_strategy_or_world_size_continues(folder: Path, strategy: str):
    assert_same_curve(records(folder, strategy, "all"), records(folder, "fsdp", "all")[2:], 1e-5)


def test_one_process_continues_what_two_began(folder: Path):
    state = load_state(folder / "fsdp/all/2")
    run(CASES["all"], Single(), folder, strategy="two to one", name="all", resume=state)
    assert_same_curve(records(folder, "two to one", "all"), records(folder, "fsdp", "all")[2:], 1e-5)


def test_three_processes_train_like_one(folder: Path):
    assert_same_curve(records(folder, "fsdp of three", "all"), records(folder, "alone", "all"), 1e-5)


def test_a_group_of_one_trains_like_one_process(folder: Path, tmp_path: Path):
    with local_group(0, 1, tmp_path):
        trained = run(CASES["tail"], ShardedParallel(), folder, strategy="fsdp of one", name="tail")
    assert_same_curve(records(folder, "fsdp of one", "tail"), records(folder, "alone", "tail"), 1e-5)
    assert (folder / "fsdp of one/tail/4/state.safetensors").exists()
    assert not trained.training
    with torch.no_grad():
        assert trained(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_each_rank_holds_and_writes_its_share(folder: Path):
    numbers = []
    for rank in (1, 2):
        with safe_open(folder / f"fsdp/all/1/state-{rank:05d}-of-00002.safetensors", framework="pt") as file:
            numbers.append(sum(file.get_tensor(key).numel() for key in file.keys() if "|step" not in key))  # noqa: SIM118
    whole = sum(3 * p.numel() for p in student(CASES["all"]).parameters())  # weights and two moments
    assert numbers == [whole / 2, whole / 2]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("apart", "StoreError: workers would resume from different steps: [1.0, 2.0]"),
        ("apart ddp", "StoreError: workers would resume from different steps: [0.0, 2.0]"),
        ("part", "StoreError: the training state is a part of one"),
        ("others", "StoreError: the training state is the part of another process"),
        ("muon", "ResourceError: muon needs whole matrices"),
    ],
)
def test_what_cannot_be_trained_is_refused_on_every_rank(folder: Path, name: str, said: str):
    for rank in (0, 1):
        assert (folder / "refused" / f"{name} {rank}.txt").read_text(encoding="utf-8").startswith(said)
