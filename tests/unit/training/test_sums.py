"""Sums over whole tensors against NumPy's in float64, at sizes where one float32 accumulator fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdft_ray.training.merge import slerp
from sdft_ray.training.schedule import Precision
from sdft_ray.training.sums import dot, l2_norm
from sdft_ray.training.weights import Weights


def values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def reference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Products of float32 are exact in float64; NumPy adds pairwise."""
    parts = zip(a.numpy().ravel().reshape(-1, 2**12), b.numpy().ravel().reshape(-1, 2**12), strict=True)
    return math.fsum(float(np.sum(x.astype(np.float64) * y)) for x, y in parts)


@pytest.mark.parametrize("count", [2**24, pytest.param(2**28, marks=pytest.mark.slow)])
def test_norm_and_dot_at_real_sizes(count: int) -> None:
    a = values(count)
    b = a.roll(1).add_(a)
    assert l2_norm(a).item() == pytest.approx(math.sqrt(reference(a, a)), rel=1e-12)
    assert dot(a, b).item() == pytest.approx(reference(a, b), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (70_001,)])
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = values(math.prod(shape)).reshape(shape).to(dtype), values(math.prod(shape), 1).reshape(shape).to(dtype)
    found = dot(a, b)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert found.item() == pytest.approx(math.fsum((a.double() * b.double()).flatten().tolist()), rel=1e-12)


def test_what_is_not_contiguous() -> None:
    a = values(3000).reshape(50, 60)
    assert dot(a.T, a.T).item() == pytest.approx(dot(a, a).item(), rel=1e-14)
    assert l2_norm(a[:, ::2]).item() == pytest.approx(np.linalg.norm(a[:, ::2].double().numpy()), rel=1e-14)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_norm_of_a_large_model(precision: Precision) -> None:
    weights = Weights(torch.nn.Linear(2**12, 2**12, bias=False), precision)
    weights.gradients_P.copy_(values(2**24))
    expected = np.linalg.norm(values(2**24).double().numpy())
    assert weights.reduce(lambda _: None) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", [2**12, pytest.param(2**14, marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_slerp_of_large_matrices(side: int) -> None:
    """sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b in float64, of tensors that are as near as siblings."""
    a = values(side**2).reshape(side, side)
    b = (a.roll(1) * 0.1).add_(a)
    angle = math.acos(reference(a, b) / math.sqrt(reference(a, a) * reference(b, b)))
    merged = slerp(a, b, 0.3)
    for rows in (slice(0, 8), slice(side - 8, side)):
        x, y = a[rows].double(), b[rows].double()
        expected = (math.sin(0.7 * angle) * x + math.sin(0.3 * angle) * y) / math.sin(angle)
        assert (merged[rows] - expected).abs().max().item() < 2e-7 * expected.abs().max().item()
