"""Cross-entropy on response tokens. The logits of a whole batch never exist at once.

Suffixes: B rows, T tokens of a row, D hidden channels, N response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB in float32."""


def response_loss(
    model: Any,
    inputs: dict[str, Any],
    loss_mask_BT: torch.Tensor,
    *,
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """Sum over response tokens of -ln p(token | its document so far), in nats: a float32 scalar.

    `inputs` comes from `sdft_ray.data.packing.attention_inputs`; `loss_mask_BT` marks the tokens to predict
    (never the first of a document). The head runs on those positions alone, in chunks of at most
    `max_logits` logits that are recomputed in the backward pass. Divide by the number of response tokens of
    the *whole* step to get a mean that does not depend on the split into micro-batches.
    """
    hidden_BTD = model.get_decoder()(**inputs).last_hidden_state
    index_N = loss_mask_BT[:, 1:].reshape(-1).nonzero().squeeze(1)
    hidden_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1]).index_select(0, index_N)
    targets_N = inputs["input_ids"][:, 1:].reshape(-1).index_select(0, index_N)
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    chunk_tokens = max(1, max_logits // head.weight.shape[0])
    if len(targets_N) <= chunk_tokens:
        return _cross_entropy(head, softcap, hidden_ND, targets_N)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden_CD, targets_C in zip(hidden_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True):
        chunk_loss = checkpoint(_cross_entropy, head, softcap, hidden_CD, targets_C, use_reentrant=False)
        assert isinstance(chunk_loss, torch.Tensor)
        total = total + chunk_loss
    return total


def _cross_entropy(
    head: torch.nn.Module, softcap: float | None, hidden_ND: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    logits_NV = head(hidden_ND).float()
    if softcap is not None:  # Gemma 2, arXiv:2408.00118, section 2
        logits_NV = torch.tanh(logits_NV / softcap) * softcap
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")
