"""The divergence from the teacher: against torch's own on one row alone, and its figures against numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.packing import Document
from sdft_ray.errors import ModelError
from sdft_ray.evaluation.divergence import teacher_kl, token_kl
from sdft_ray.evaluation.shift import ResponseNll, mean_nll
from sdft_ray.statistics.clustered import clustered_quantile
from tests.support.tiny import build_model, make_tokenizer
from tests.unit.evaluation.test_shift import PAIRS


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    chat = ChatFormat(load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))))
    return [chat.encode(instruction, response) for instruction, response in PAIRS]


def models() -> tuple[Any, Any]:
    torch.manual_seed(0)
    teacher = build_model()
    student = build_model()
    with torch.no_grad():
        for weights in student.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return teacher, student


@torch.no_grad()
def naive(teacher: Any, student: Any, document: Document) -> list[float]:
    ids = torch.tensor([document.ids])
    p_TV, q_TV = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (teacher, student))
    kl_TV = torch.nn.functional.kl_div(q_TV, p_TV, reduction="none", log_target=True)
    return [float(kl_TV[t - 1].sum()) for t, marked in enumerate(document.loss_mask) if marked]


@pytest.mark.parametrize("batch_tokens", [1, 300, 4096])
def test_the_divergence_is_torchs(batch_tokens: int, documents: list[Document]) -> None:
    teacher, student = models()
    found = token_kl(teacher, student, documents, batch_tokens=batch_tokens)
    for row, document in zip(found, documents, strict=True):
        assert row == pytest.approx(naive(teacher, student, document), rel=1e-3, abs=1e-6)
        assert max(row) > 1e-4
    assert [value for row in token_kl(teacher, teacher, documents) for value in row] == pytest.approx(
        [0.0] * sum(map(len, found)), abs=1e-6
    )


def test_a_broken_model(documents: list[Document]) -> None:
    teacher, student = models()
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        token_kl(teacher, student, documents)


def test_the_figures() -> None:
    random = np.random.default_rng(0)
    rows = [random.exponential(size=size).tolist() for size in random.integers(1, 40, size=50)]
    found = teacher_kl([*rows, []])
    assert found is not None
    values = np.concatenate(rows)
    assert (found.num_rows, found.num_tokens) == (50, len(values))
    assert found.mean.value == pytest.approx(values.mean())
    assert found.mean == mean_nll([ResponseNll(math.fsum(row), len(row)) for row in rows])
    assert found.p99.value == np.quantile(values, 0.99, method="inverted_cdf")
    assert found.p99.value is not None
    assert found.p99.low is not None
    assert found.p99.high is not None
    assert found.p99.value is not None
    assert found.p99.low < found.p99.value < found.p99.high
    assert teacher_kl([[], []]) is None


def test_a_single_row_has_a_quantile_and_no_limits() -> None:
    found = clustered_quantile([list(range(1, 101))], 0.99)
    assert (found.value, found.low, found.high) == (99, None, None)


def test_the_limits_of_a_quantile_are_as_wide_as_its_spread_over_new_rows() -> None:
    """Rows share a level, so that tokens of a row are alike: 90 % quantiles of 200 new samples of 60 rows."""
    random = np.random.default_rng(1)

    def sample() -> list[list[float]]:
        return [(random.exponential() * random.exponential(size=20)).tolist() for _ in range(60)]

    spread = np.std([np.quantile(np.concatenate(sample()), 0.9) for _ in range(200)])
    widths = []
    for _ in range(20):
        found = clustered_quantile(sample(), 0.9, draws=300)
        assert found.low is not None
        assert found.high is not None
        widths.append((found.high - found.low) / 3.92)
    assert np.mean(widths) == pytest.approx(spread, rel=0.2)
