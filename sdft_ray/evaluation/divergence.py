"""How far a model's next-token distributions are from the teacher's, on what the teacher itself answered.

At every token of a response the forward KL divergence, sum over the vocabulary of p (ln p - ln q) in nats, p the
teacher's distribution and q the model's, both given the same text before it. Its mean over tokens is the loss of logit
distillation; its 99th percentile says how bad the rare tokens are at which the two part, which a mean hides.

Rows are the sample, as in `sdft_ray.evaluation.shift`: the mean has its linearised error over rows, the percentile the
limits of a bootstrap over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdft_ray.errors import ModelError
from sdft_ray.evaluation.shift import ResponseNll, batches, mean_nll, response_logits
from sdft_ray.statistics.estimate import Estimate, Interval

if TYPE_CHECKING:
    from sdft_ray.data.packing import Document

_HIGH = 0.99


@dataclass(frozen=True)
class TeacherKl:
    """In nats per token, over `num_tokens` tokens of `num_rows` answers; a single row has no error and no limits."""

    num_rows: int
    num_tokens: int
    mean: Estimate
    p99: Interval


def token_kl(
    teacher: Any,
    model: Any,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 2048,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """The divergence at every token that `loss_mask` marks, by document, in order; at least 0.

    Both models lie on one device. In float32, whatever their dtype. Documents are batched as in `shift.response_nll`.
    Raises `ModelError` where one is not finite.
    """
    import torch

    found: dict[int, list[float]] = {}
    for batch in batches([len(document.ids) for document in documents], batch_tokens):
        chosen = [documents[index] for index in batch]
        with torch.inference_mode():
            pairs = zip(response_logits(teacher, chosen), response_logits(model, chosen), strict=True)
            for index, (teacher_NV, model_NV) in zip(batch, pairs, strict=True):
                found[index] = _kl(teacher_NV, model_NV)
        if on_batch is not None:
            on_batch(len(found), len(documents))
    if not all(math.isfinite(value) for row in found.values() for value in row):
        raise ModelError(
            "the models give distributions that are not finite", "check the weights, or use bfloat16 or float32"
        )
    return [found[index] for index in range(len(documents))]


def _kl(teacher_NV: Any, model_NV: Any) -> list[float]:
    p_NV, q_NV = teacher_NV.float().log_softmax(-1), model_NV.float().log_softmax(-1)
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1).clamp_min(0.0).tolist()


def teacher_kl(rows: Sequence[Sequence[float]]) -> TeacherKl | None:
    """Figures of `token_kl`; None without tokens."""
    from sdft_ray.statistics.clustered import clustered_quantile

    known = [row for row in rows if row]
    if not known:
        return None
    mean = mean_nll([ResponseNll(math.fsum(row), len(row)) for row in known])
    return TeacherKl(len(known), sum(map(len, known)), mean, clustered_quantile(known, _HIGH))
