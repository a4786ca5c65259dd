"""The distribution gap: how far reference responses are from a model, compared with the teacher's own rewrites.

Self-data moves the data to the teacher (arXiv:2410.09982), which shows in the teacher's negative log-likelihood
(NLL) of the two texts. Both are scored as answers to the plain instruction: the rewrite was written with the
reference in sight, but that is not how it is trained on.

The mean is over tokens, like the training loss: for rows i with nats n_i on t_i response tokens it is
m = sum n / sum t. Tokens of a row are correlated, so rows are the sample, and m is a ratio estimator. Its
standard error is linearised (Cochran, Sampling Techniques, 1977, chapter 6): row i moves m by
u_i = (n_i - m t_i) / sum t, and se^2 = N / (N - 1) sum u_i^2. A gap between two texts of the same rows is paired:
the difference of the two u_i takes the place of u_i, so that what makes a row hard for both cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft_ray.errors import ModelError
from sdft_ray.statistics.estimate import Estimate

if TYPE_CHECKING:  # a report takes figures from here, and needs no torch for that
    from sdft_ray.data.packing import Document


class ResponseNll(NamedTuple):
    """One response: the sum of -ln p over its tokens, end of turn included, in nats, and how many there are."""

    nats: float
    num_tokens: int


@dataclass(frozen=True)
class Shift:
    """The NLL of the two texts under each model, in nats per response token.

    `nll` maps model ("teacher", "pruned") and text ("reference", "distilled") to a mean. `gaps` maps the model
    to mean(reference) - mean(distilled): positive where references are less likely. Both are empty
    without rows; a standard error is None with a single one.
    """

    num_rows: int
    nll: dict[str, dict[str, Estimate]]
    gaps: dict[str, Estimate]


def response_nll(
    model: Any,
    documents: Sequence[Document],
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[ResponseNll]:
    """Score the tokens that `loss_mask` marks, in the order of `documents` (the first of a document is never one).

    Documents are batched by length and padded on the right; a batch holds at most `batch_tokens` positions, pads
    included, but always one document. Log-probabilities are float32, whatever the model's dtype, and sums float64.
    `on_batch` is called with (documents done, documents in all). Raises `ModelError` where a likelihood is not
    finite.
    """
    import torch

    nll_by_index: dict[int, ResponseNll] = {}
    for batch in batches([len(document.ids) for document in documents], batch_tokens):
        with torch.inference_mode():
            scored = _score(model, [documents[index] for index in batch])
        nll_by_index.update(zip(batch, scored, strict=True))
        if on_batch is not None:
            on_batch(len(nll_by_index), len(documents))
    if not all(math.isfinite(row.nats) for row in nll_by_index.values()):
        raise ModelError(
            "the model gives likelihoods that are not finite", "check the weights, or use bfloat16 or float32"
        )
    return [nll_by_index[index] for index in range(len(documents))]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the documents of each batch, the shortest documents first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score(model: Any, documents: Sequence[Document]) -> list[ResponseNll]:
    """One forward pass of the backbone; the output head sees the tokens before scored ones alone."""
    import torch

    from sdft_ray.models.head import OutputHead

    states = response_states(model, documents)
    counts_B = torch.tensor(states.counts, device=states.hidden_ND.device)
    losses_N = OutputHead.of(model).token_losses(states.hidden_ND, states.targets_N)
    rows_N = torch.arange(len(counts_B), device=counts_B.device).repeat_interleave(counts_B)
    nats_B = losses_N.new_zeros(len(documents)).index_add_(0, rows_N, losses_N)
    return [ResponseNll(*row) for row in zip(nats_B.tolist(), states.counts, strict=True)]


class ResponseStates(NamedTuple):
    """What predicts the tokens that `loss_mask` marks: hidden states after the final norm, (N, D), and these tokens,
    (N,), document by document; `counts` says how many each document has."""

    hidden_ND: Any
    targets_N: Any
    counts: list[int]


def response_states(model: Any, documents: Sequence[Document]) -> ResponseStates:
    """One forward pass of the backbone over `documents`."""
    import torch

    width = max(len(document.ids) for document in documents)
    ids_BT = torch.zeros(len(documents), width, dtype=torch.int64)
    scored_BT = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids_BT[row, : len(document.ids)] = torch.tensor(document.ids)
        scored_BT[row, 1 : len(document.ids)] = torch.tensor(document.loss_mask[1:], dtype=torch.bool)
    rows_N, columns_N = (index.to(model.device) for index in scored_BT.nonzero(as_tuple=True))
    ids_BT = ids_BT.to(model.device)
    # Right padding needs no attention mask: attention is causal and the pads are not scored.
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return ResponseStates(hidden_BTD[rows_N, columns_N - 1], ids_BT[rows_N, columns_N], scored_BT.sum(1).tolist())


def mean_nll(rows: Sequence[ResponseNll]) -> Estimate:
    """Nats per token over all response tokens of at least one row, with its standard error over rows."""
    return Estimate(_mean(rows), _stderr(_influences(rows)))


def paired_gap(first: Sequence[ResponseNll], second: Sequence[ResponseNll]) -> Estimate:
    """`mean_nll(first) - mean_nll(second)`, where position i of both belongs to the same row."""
    moves = [a - b for a, b in zip(_influences(first), _influences(second), strict=True)]
    return Estimate(_mean(first) - _mean(second), _stderr(moves))


def shift(rows: Mapping[str, Mapping[str, Sequence[ResponseNll]]]) -> Shift:
    """From model -> text -> rows to means and paired gaps. All lists hold the same rows in the same order."""
    num_rows = {len(part) for texts in rows.values() for part in texts.values()} or {0}
    assert len(num_rows) == 1, "the texts of all models have the same rows"
    if num_rows == {0}:
        return Shift(0, {}, {})
    return Shift(
        num_rows.pop(),
        {model: {text: mean_nll(part) for text, part in texts.items()} for model, texts in rows.items()},
        {model: paired_gap(texts["reference"], texts["distilled"]) for model, texts in rows.items()},
    )


def verdict(measured: Shift) -> str:
    """A sentence on whether rewriting pays, from the teacher's gap. A gap counts if it exceeds two standard errors."""
    if not measured.num_rows:
        return (
            "No rewrite was kept, so there is nothing to compare: the distilled set holds references alone. "
            "See the reasons of the selection."
        )
    gap = measured.gaps["teacher"]
    assert gap.value is not None
    if gap.stderr is None:
        return "A single row has no standard error, so its gap says nothing: rewrite more rows, or raise num_rows."
    if abs(gap.value) <= 2 * gap.stderr:
        return (
            f"References and rewrites are equally near to the teacher: the gap of {figure(gap)} nats per token is "
            "within two standard errors. References already read like the teacher, so rewriting will hardly pay."
        )
    if gap.value > 0:
        return (
            f"References are {figure(gap)} nats per token further from the teacher than its own rewrites, more than "
            "two standard errors. Fine-tuning on references pulls the model away from what the teacher knows, so "
            "rewriting is likely to pay."
        )
    return (
        f"Rewrites are {figure(Estimate(-gap.value, gap.stderr))} nats per token further from the teacher than "
        "references, more than two standard errors. The rewriting prompt makes the teacher write what it would not "
        "write by itself: check the rewriting template."
    )


def _mean(rows: Sequence[ResponseNll]) -> float:
    return math.fsum(row.nats for row in rows) / sum(row.num_tokens for row in rows)


def _influences(rows: Sequence[ResponseNll]) -> list[float]:
    """u_i: by how much each row moves the mean. They add up to 0."""
    mean, num_tokens = _mean(rows), sum(row.num_tokens for row in rows)
    return [(row.nats - mean * row.num_tokens) / num_tokens for row in rows]


def _stderr(moves: Sequence[float]) -> float | None:
    count = len(moves)
    return math.sqrt(count / (count - 1) * math.fsum(move**2 for move in moves)) if count > 1 else None


def figure(estimate: Estimate) -> str:
    """0.393 ± 0.021: the error with two figures that count, and at least two decimals."""
    assert estimate.value is not None
    assert estimate.stderr is not None
    digits = max(2, 1 - math.floor(math.log10(estimate.stderr))) if estimate.stderr > 0 else 3
    value = 0.0 if abs(estimate.value) < 0.5 * 10**-digits else estimate.value
    return f"{value:.{digits}f} ± {estimate.stderr:.{digits}f}".replace("-", "\u2212")
