"""Attention inside each document of packed rows, without the products between documents that a mask throws away.

    with document_attention(model):
        model(**attention_inputs(rows, [0, 1]))

A row of 512 tokens that holds documents of 60 has 8 times the products that they need. Documents of about the same
length are laid side by side, padded at their end, where causal attention never looks.

Suffixes: B rows, T tokens of a row, N documents laid side by side, L tokens of each, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AttentionInterface

IMPLEMENTATION = "sdft_documents"
_SHORTEST = 16
_LONG = 512
"""Tokens of a document from which torch's fused kernel is faster than plain products in bfloat16, as measured on a CPU:
0.5 of their speed at 512 tokens, 1.5 at 2,048. In float32 it always is."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a micro-batch lie while attention is computed.

    `groups` holds an (N, L) tensor of places in the flattened micro-batch for each length; what pads a document is its
    last token once more. `back` says for each token of the micro-batch where it stands among the groups, one group
    after another.
    """

    groups: tuple[torch.Tensor, ...]
    back: torch.Tensor

    @classmethod
    def of(cls, position_ids_BT: torch.Tensor) -> Layout:
        """By positions that restart at 0 with every document, as `data.packing` gives them."""
        flat = position_ids_BT.reshape(-1)
        starts = (flat == 0).nonzero().squeeze(1)
        lengths = torch.diff(starts, append=starts.new_tensor([len(flat)]))
        padded = torch.tensor([_padded(length) for length in lengths.tolist()], device=flat.device)
        groups, back, num_slots = [], torch.empty_like(flat), 0
        for length in padded.unique().tolist():
            chosen = padded == length
            offsets_NL = torch.arange(length, device=flat.device).expand(int(chosen.sum()), length)
            ends_N1 = lengths[chosen, None] - 1
            groups.append(starts[chosen, None] + offsets_NL.minimum(ends_N1))
            real_NL = offsets_NL <= ends_N1
            back[groups[-1][real_NL]] = num_slots + real_NL.reshape(-1).nonzero().squeeze(1)
            num_slots += real_NL.numel()
        return cls(tuple(groups), back)


def _padded(length: int) -> int:
    """Few different lengths, none more than a quarter longer than what it stands for."""
    step = max(_SHORTEST, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


@contextmanager
def document_attention(model: Any) -> Iterator[None]:
    """Inside, forward passes of a transformers model take positions that restart with every document, and no mask."""
    configured = model.config._attn_implementation
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(_with_layout, with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(configured)


def _with_layout(_: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Once per forward pass; transformers hands what it does not know on to every block."""
    return arguments, {**inputs, "documents": Layout.of(inputs["position_ids"])}


def _attention(
    module: Any,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: None,
    *,
    documents: Layout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; keys and values may have fewer heads. The result is (B, T, H, D)."""
    assert attention_mask is None
    num_rows, num_heads, row_tokens, _head = query_BHTD.shape
    tokens = [states.transpose(1, 2).flatten(0, 1) for states in (query_BHTD, key_BHTD, value_BHTD)]
    dropout = dropout if module.training else 0.0
    outputs = []
    for places_NL in documents.groups:
        query, key, value = (_laid(states, places_NL) for states in tokens)
        if key.shape[1] != num_heads:
            key, value = (states.repeat_interleave(num_heads // key.shape[1], dim=1) for states in (key, value))
        by_kernel = softcap is None and (query.dtype == torch.float32 or places_NL.shape[1] > _LONG)
        attend = _by_kernel if by_kernel else partial(_by_products, softcap=softcap)
        output_NHLD = attend(query, key, value, scaling, dropout, sliding_window)
        outputs.append(output_NHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, documents.back).unflatten(0, (num_rows, row_tokens)), None


def _laid(states: torch.Tensor, places_NL: torch.Tensor) -> torch.Tensor:
    """(tokens, H, D) -> (N, H, L, D)."""
    return states.index_select(0, places_NL.reshape(-1)).unflatten(0, places_NL.shape).transpose(1, 2)


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float, window: int | None
) -> torch.Tensor:
    """(N, H, L, D) each."""
    windowed = window is not None and window < query.shape[2]
    bias_LL = _bias(query, window) if windowed else None
    return F.scaled_dot_product_attention(
        query, key, value, bias_LL, dropout_p=dropout, is_causal=not windowed, scale=scaling
    )


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    *,
    softcap: float | None,
) -> torch.Tensor:
    """The same written out."""
    shape = query.shape
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    bias_LL = _bias(query, window)
    if softcap is None:
        scores = torch.baddbmm(bias_LL.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scaling)
    else:
        scores = softcap * torch.tanh(torch.bmm(query, key.transpose(1, 2)) * (scaling / softcap)) + bias_LL
    weights = F.dropout(scores.softmax(-1), dropout)  # the softmax of bfloat16 computes in float32 inside
    return torch.bmm(weights, value).view(shape)


def _bias(query: torch.Tensor, window: int | None) -> torch.Tensor:
    """(L, L): minus infinity for the keys that a query does not see."""
    offsets_L = torch.arange(query.shape[-2], device=query.device)
    back_LL = offsets_L[:, None] - offsets_L
    hidden_LL = back_LL < 0 if window is None else (back_LL < 0) | (back_LL >= window)
    return torch.zeros_like(back_LL, dtype=query.dtype).masked_fill_(hidden_LL, -torch.inf)


AttentionInterface.register(IMPLEMENTATION, _attention)
