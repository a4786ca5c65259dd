"""Tune the end of a model and leave the rest as it is."""

from __future__ import annotations

from typing import Any

from sdft_ray.errors import ModelError


def tune_tail(model: Any, num_blocks: int) -> Any:
    """Leave the output head, the final norm and the last `num_blocks` decoder blocks trainable, freeze all else.

    A strong and cheap baseline after depth pruning (arXiv:2411.15558, which tunes the head and three blocks). Where
    the embedding table is the head, it is tuned too. `model` is changed in place and returned. Raises `ModelError`
    for more blocks than there are.
    """
    decoder = model.get_decoder()
    if not 0 <= num_blocks <= len(decoder.layers):
        raise ModelError(
            f"the model has {len(decoder.layers)} blocks, but {num_blocks} are to be trained",
            "lower train.train_last_n_layers",
        )
    model.requires_grad_(False)
    first = len(decoder.layers) - num_blocks
    for module in (*decoder.layers[first:], decoder.norm, model.get_output_embeddings()):
        module.requires_grad_(True)
    return model
