"""Floating-point operations that training needs, counted on the model itself: what it computes, and what is tuned.

    flops = training_flops(model, plan.objective, teacher)
    flops.of(num_tokens, num_loss_tokens, positions_N)      # one step, all its rows

A linear map costs two operations per weight and token forward, two more for the gradient of its weights if they are
tuned, and two for that of its input if anything before it is: 6 for full fine-tuning, 4 for a frozen map with adapters
before it, 2 below the first tuned block. Attention scores count the pairs of a query and a key that it may see.
Padding, recomputed activations, norms, rotations and the loss itself count nothing, as is usual for MFU (PaLM,
arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from sdft_ray.recipe.arms import Objective

_ORDER = {
    name: place
    for place, names in enumerate(
        (
            ("input_layernorm",),
            ("q_proj", "k_proj", "v_proj", "qkv_proj"),
            ("q_norm", "k_norm"),
            ("o_proj",),
            ("post_attention_layernorm", "pre_feedforward_layernorm"),
            ("gate_proj", "up_proj", "gate_up_proj"),
            ("down_proj",),
        )
    )
    for name in names
}
"""When the modules of a block run; modules of one place do not read each other."""
_SCORES = _ORDER["o_proj"]
_LAST = len(_ORDER)


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward operations by what they grow with.

    `per_token`: linear maps of all blocks. `per_loss_token`: the output head, which runs where a response token is
    predicted. `per_pair`: attention scores, for each query and key that it sees, by the window of the blocks (None:
    the whole document).
    """

    per_token: int = 0
    per_loss_token: int = 0
    per_pair: Mapping[int | None, int] = field(default_factory=dict)

    def of(self, num_tokens: int, num_loss_tokens: int, positions_N: np.ndarray) -> int:
        """For documents with so many tokens; `positions_N` are those of the tokens within their documents, from 0."""
        pairs = sum(flops * num_pairs(positions_N, window) for window, flops in self.per_pair.items())
        return self.per_token * num_tokens + self.per_loss_token * num_loss_tokens + pairs

    def __add__(self, other: StepFlops) -> StepFlops:
        per_pair = Counter(self.per_pair) + Counter(other.per_pair)
        return StepFlops(self.per_token + other.per_token, self.per_loss_token + other.per_loss_token, per_pair)


def num_pairs(positions_N: np.ndarray, window: int | None) -> int:
    """Keys that all tokens see: itself and those before it in its document, at most `window` in all."""
    seen_N = positions_N if window is None else np.minimum(positions_N, window - 1)
    return int(seen_N.sum(dtype=np.int64)) + len(positions_N)


def training_flops(model: Any, objective: Objective, teacher: Any = None) -> StepFlops:
    """For `model` as it is, adapters and frozen weights included, and the forward pass of a frozen `teacher`, if any.

    Both are causal language models of transformers, `model` perhaps in peft's wrapping.
    """
    reads_logits = bool(objective.cross_entropy or objective.divergences)
    flops = model_flops(model, with_head=reads_logits)
    if teacher is not None and objective.needs_teacher:
        flops = flops + model_flops(teacher, with_head=bool(objective.divergences))
    return flops


def model_flops(model: Any, *, with_head: bool = True) -> StepFlops:
    """Of one model, whose parameters say by `requires_grad` what is tuned."""
    decoder = model.get_decoder()
    carries = _is_tuned(decoder.embed_tokens)  # whether gradients flow on into what lies before
    per_token, per_pair = 0, Counter()
    for block, window in zip(decoder.layers, _windows(model.config.get_text_config()), strict=True):
        tuned = [_place(name) for name, param in block.named_parameters() if param.requires_grad]
        first_tuned = -1 if carries else min(tuned, default=_LAST)
        per_token += sum(_linear_flops(linear, _place(name) > first_tuned) for name, linear in _linears(block))
        # Two products of queries and keys, two operations each for every channel of every head; their gradients twice.
        per_pair[window] += 4 * block.self_attn.o_proj.in_features * (3 if first_tuned < _SCORES else 1)
        carries = carries or bool(tuned)
    carries = carries or _is_tuned(decoder.norm)
    head = _linear_flops(model.get_output_embeddings(), carries) if with_head else 0
    return StepFlops(per_token, head, per_pair)


def _linear_flops(linear: nn.Linear, input_has_gradient: bool) -> int:
    # By its sizes: a sharded weight does not say how large it is.
    return 2 * linear.in_features * linear.out_features * (1 + input_has_gradient + linear.weight.requires_grad)


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear))


def _place(name: str) -> float:
    """When a module of a block runs; an adapter's second map comes after its first."""
    parts = name.split(".")
    place = next((_ORDER[part] for part in parts if part in _ORDER), _LAST)
    return place + 0.5 * ("lora_B" in parts)


def _is_tuned(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())


def _windows(config: Any) -> list[int | None]:
    """How far each block attends; None: over the whole document."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in kinds]
