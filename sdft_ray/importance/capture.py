"""Forward hooks that record the residual stream of a stock transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sdft_ray.errors import ModelError


def backbone_and_blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The model without its LM head, and its decoder blocks in order.

    Raises `ModelError` if the model is not a decoder with one list of blocks.
    """
    backbone = getattr(model, "base_model", model)
    blocks = getattr(backbone, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks to measure",
            "give a causal language model of a supported family",
        )
    return backbone, blocks


@contextmanager
def residual_stream(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Record boundaries 0..L of every forward pass inside the `with`, each (B, T, D) in the model's dtype.

    Boundary l < L is the input of block l; boundary L is what the last block returns, *before* the final norm
    (the last entry of `output_hidden_states` of transformers is after it, hence hooks). Nothing is copied: the list
    keeps the activations alive until it is cleared.
    """
    stream_LBTD: list[Tensor] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream_LBTD.append(args[0] if args else kwargs["hidden_states"])

    def after_last(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        stream_LBTD.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after_last))
    try:
        yield stream_LBTD
    finally:
        for handle in handles:
            handle.remove()
        stream_LBTD.clear()
