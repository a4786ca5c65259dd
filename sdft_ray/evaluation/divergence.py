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
from sdft_ray.evaluation.shift import ResponseNll, batches, mean_nll, response_states
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

    Both models lie on one device. Logits are float32, whatever the models' dtype, and sums float64. Documents are
    batched as in `shift.response_nll`. Raises `ModelError` where one is not finite.
    """
    import torch

    found: dict[int, list[float]] = {}
    for batch in batches([len(document.ids) for document in documents], batch_tokens):
        chosen = [documents[index] for index in batch]
        with torch.inference_mode():
            found.update(zip(batch, _batch_kl(teacher, model, chosen), strict=True))
        if on_batch is not None:
            on_batch(len(found), len(documents))
    if not all(math.isfinite(value) for row in found.values() for value in row):
        raise ModelError(
            "the models give distributions that are not finite", "check the weights, or use bfloat16 or float32"
        )
    return [found[index] for index in range(len(documents))]


def _batch_kl(teacher: Any, model: Any, documents: Sequence[Document]) -> list[list[float]]:
    """Logits of both models are in memory for a part of the tokens at a time."""
    import torch

    from sdft_ray.models.head import OutputHead

    heads = OutputHead.of(teacher), OutputHead.of(model)
    states = response_states(teacher, documents), response_states(model, documents)
    size = min(head.chunk_tokens for head in heads)
    parts = [
        _kl(*(head.logits(hidden_CD) for head, hidden_CD in zip(heads, pair, strict=True)))
        for pair in zip(*(state.hidden_ND.split(size) for state in states), strict=True)
    ]
    return [row.tolist() for row in torch.cat(parts).split(states[0].counts)]


def _kl(teacher_NV: Any, model_NV: Any) -> Any:
    p_NV, q_NV = teacher_NV.double().log_softmax(-1), model_NV.double().log_softmax(-1)
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1).clamp_min(0.0)


def teacher_kl(rows: Sequence[Sequence[float]]) -> TeacherKl | None:
    """Figures of `token_kl`; None without tokens."""
    from sdft_ray.statistics.clustered import clustered_quantile

    known = [row for row in rows if row]
    if not known:
        return None
    mean = mean_nll([ResponseNll(math.fsum(row), len(row)) for row in known])
    return TeacherKl(len(known), sum(map(len, known)), mean, clustered_quantile(known, _HIGH))
