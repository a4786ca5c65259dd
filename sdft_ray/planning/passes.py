"""Memory of passes over texts without training: measuring, the distribution gap, speed; and of streamed checkpoints."""

from __future__ import annotations

from sdft_ray.planning.engines import forward_bytes
from sdft_ray.planning.need import CUDA_CONTEXT, MIB, TORCH_PROCESS, Need, Place, peak
from sdft_ray.planning.shape import ModelShape
from sdft_ray.planning.training import MAX_LOGITS

STREAM_BYTES = 64 * MIB
"""`importance.depth.STREAM_BYTES`: the residual streams that one pass keeps."""
_UNITS_BYTES = 4 * MIB
"""`importance.depth._UNITS_BYTES`: unit vectors at once."""


def measure_need(
    shape: ModelShape,
    element: int,
    *,
    batch_tokens: int,
    max_tokens: int,
    losses: bool = False,
    channels: bool = False,
    num_tasks: int = 1,
    on_gpu: bool = False,
) -> Need:
    """Measuring importance: a batch runs in parts whose residual streams fit `STREAM_BYTES`, at least one row each.

    `losses`: also without blocks, which keeps the streams of a part beside the logits of some tokens. `channels`: also
    activations of the MLP and of heads in float32, one block at a time.
    """
    place: Place = "GPU memory" if on_gpu else "memory"
    stream = (shape.num_blocks + 1) * shape.hidden * element
    tokens = min(batch_tokens, max(STREAM_BYTES // stream, min(max_tokens, batch_tokens)))
    terms = {
        "process": CUDA_CONTEXT if on_gpu else TORCH_PROCESS,
        "weights": shape.weight_bytes(element),
        "residual streams": tokens * stream + 2 * _UNITS_BYTES,
        "activations": tokens * forward_bytes(shape, element),
    }
    if channels:
        terms["channels"] = tokens * 4 * max(shape.mlp, shape.query, shape.hidden)
    if losses:
        terms["logits"] = 3 * 4 * min(tokens * shape.vocab, max(shape.vocab, MAX_LOGITS[place]))
    return Need(terms, place, num_tasks)


def patch_need(shape: ModelShape, element: int, *, num_gaps: int, batch_tokens: int, on_gpu: bool = False) -> Need:
    """Fitting patches: a pass as for measuring, and for each gap sums of products of hidden states in float64."""
    need = measure_need(shape, element, batch_tokens=batch_tokens, max_tokens=batch_tokens, on_gpu=on_gpu)
    return Need({**need.terms, "sums": 4 * max(1, num_gaps) * shape.hidden**2 * 8}, need.place)


def gap_need(
    shape: ModelShape,
    element: int,
    *,
    batch_tokens: int,
    longest_tokens: int,
    compared: bool = False,
    on_gpu: bool = False,
) -> Need:
    """Likelihoods of responses: logits of some tokens at a time, as for measuring. `compared`: also the divergence of
    two models that are in memory together, whose logits, log-probabilities and terms are in float64.
    """
    place: Place = "GPU memory" if on_gpu else "memory"
    tokens = max(batch_tokens, longest_tokens)
    logits = min(tokens * shape.vocab, max(shape.vocab, MAX_LOGITS[place]))
    return Need(
        {
            "process": CUDA_CONTEXT if on_gpu else TORCH_PROCESS,
            "weights": (2 if compared else 1) * shape.weight_bytes(element),
            "activations": tokens * forward_bytes(shape, element),
            "logits": logits * (2 * (4 + 8 + 8) if compared else 3 * 4),
        },
        place,
    )


def speed_need(
    shapes: tuple[ModelShape, ...], element: int, *, batch_rows: int, prompt_tokens: int, new_tokens: int, on_gpu: bool
) -> Need:
    """Speed of several models, all held at once, one computing at a time."""
    place: Place = "GPU memory" if on_gpu else "memory"
    largest = max(shapes, key=lambda shape: shape.num_parameters)
    return Need(
        {
            "process": CUDA_CONTEXT if on_gpu else TORCH_PROCESS,
            "weights": sum(shape.weight_bytes(element) for shape in shapes),
            "keys and values": batch_rows * (prompt_tokens + new_tokens) * largest.kv_bytes(element),
            "activations": batch_rows * prompt_tokens * forward_bytes(largest, element),
            "logits": batch_rows * largest.vocab * element,
        },
        place,
    )


def checkpoint_need(shape: ModelShape, element: int) -> Need:
    """Writing a pruned or merged checkpoint: bytes are streamed, then the result is loaded and asked once."""
    process = {"process": TORCH_PROCESS}
    return Need(peak(process | {"weights": shape.weight_bytes(element), "logits": 16 * shape.vocab * (element + 4)}))
