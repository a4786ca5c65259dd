"""Memory of one worker of training: what `training.weights`, `.step`, `.head` and `.attention` hold at their peak.

P parameters, of which some are trained; n tokens of a micro-batch; e bytes of an element in the compute dtype; channels
D hidden, Q of all query heads, M of the MLP; V vocabulary; H heads; A the tokens of a document in attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.planning.need import CUDA_CONTEXT, TORCH_PROCESS, Need, Place, peak
from sdft_ray.planning.shape import ModelShape
from sdft_ray.recipe import resources
from sdft_ray.recipe.arms import Lora, Objective

MAX_LOGITS = {"memory": 2**23, "GPU memory": 2**26}
"""`training.head.MAX_LOGITS`, by where they lie."""
_LONG = 512
"""`training.attention._LONG`: in bfloat16 shorter documents are attended to by plain products, which keep all scores.
"""
_PADDED = 1.12
"""Documents are padded by at most a quarter, on average by half of that (`training.attention._padded`)."""
_HEAP = {"memory": 0.5, "GPU memory": 0.1}
"""What allocators hold beyond the tensors of a pass: glibc keeps freed ones in its heap, which fragments. Measured were
from 10 % of the activations and the head (tensors of some MiB) to 80 % (of some hundred KiB). With every tensor mapped
by itself (`M_MMAP_THRESHOLD`) it is nothing, and a step takes half as long again."""
_SLICE_BYTES = 2**26
"""One message of the sum of gradients (`training.parallel`)."""


@dataclass(frozen=True)
class Training:
    """What is trained on what: one worker's share of a step is `micro_batch_rows` rows of `row_tokens` at a time."""

    student: ModelShape
    objective: Objective
    row_tokens: int
    document_tokens: int
    """Of a long document of the set, at most `row_tokens`."""
    rows_per_step: int
    dtype_bytes: int
    """Of the teacher, and of the student that is written."""
    lora: Lora | None = None
    tail_blocks: int | None = None
    optimizer: str = "adamw"
    has_average: bool = False
    teacher: ModelShape | None = None
    """Beside the student, where the objective needs it."""


def worker_need(work: Training, settings: resources.Train, *, num_workers: int, micro_batch_rows: int) -> Need:
    """The larger of loading the model, of a step, and of gathering the result."""
    place: Place = "GPU memory" if settings.gpus else "memory"
    rows = min(micro_batch_rows, -(-work.rows_per_step // num_workers))
    in_micro_batches = rows * num_workers < work.rows_per_step
    base = {"process": CUDA_CONTEXT if settings.gpus else TORCH_PROCESS}
    whole = work.student.weight_bytes(work.dtype_bytes if work.lora else 4)
    step = {
        **base,
        **_states(work, settings, num_workers if settings.strategy == "fsdp" else 1, in_micro_batches),
        **_pass(work, settings, rows, place),
    }
    if num_workers > 1 and settings.strategy == "ddp":
        step["exchange"] = min(2 * _SLICE_BYTES, 4 * _num_trained(work))
    loading = {**base, "weights": whole}
    if settings.strategy == "fsdp":  # rank 0 gathers the whole beside its shards
        shards = _states(work, settings, num_workers, False)
        return Need(peak(step, {**base, **shards, "whole model": whole}), place, num_workers)
    return Need(peak(step, loading), place, num_workers)


def _num_trained(work: Training) -> int:
    student = work.student
    if work.lora is not None:  # A and B of each linear map of a block: rank x (inputs + outputs)
        hidden, mlp, query, key = student.hidden, student.mlp, student.query, student.key
        ends = (hidden + query) * 2 + (hidden + key) * 2 + (hidden + mlp) * 3
        return student.num_blocks * work.lora.rank * ends
    if work.tail_blocks is not None:
        return work.tail_blocks * student.block_parameters + student.head_parameters
    return student.num_parameters


def _states(work: Training, settings: resources.Train, num_shards: int, in_micro_batches: bool) -> dict[str, int]:
    """Weights, masters, gradients and what the optimizer keeps (`training.weights`, `training.sharding`)."""
    trained, frozen = _num_trained(work), 0
    if work.lora is not None or work.tail_blocks is not None:
        frozen = work.student.num_parameters - (0 if work.lora else trained)
    compute = 2 if settings.precision == "bf16" else 4
    stored = work.dtype_bytes if work.lora else 4
    kept = compute + (stored if stored != compute else 0)  # frozen weights are restored at the end
    moments = 4 if work.optimizer == "muon" else 8
    terms = {
        "weights": frozen * kept + trained * 4 // num_shards,
        "gradients": trained * 4 // num_shards,
        "optimizer": trained * moments // num_shards,
    }
    if compute == 2:
        terms["bfloat16 copies"] = trained * 2 if num_shards == 1 else 0
    if num_shards > 1:
        block, rest = work.student.block_parameters, work.student.num_parameters
        rest -= work.student.num_blocks * block
        blocks = 2 * block if settings.reshard_after_forward else work.student.num_blocks * block
        terms["gathered weights"] = (blocks + rest) * compute
        if settings.reduce_once and in_micro_batches:
            terms["whole gradients"] = trained * 4
    if work.has_average:
        terms["running average"] = trained * 4 // num_shards
    return terms


def _pass(work: Training, settings: resources.Train, rows: int, place: Place) -> dict[str, int]:
    """One forward and backward pass: what blocks keep for it, the head's chunks, and the teacher's pass."""
    student, tokens = work.student, rows * work.row_tokens
    element = 2 if settings.precision == "bf16" else 4
    block = tokens * block_bytes(student, element, work.document_tokens)
    depth = student.num_blocks
    if work.tail_blocks is not None and not student.is_tied:
        depth = work.tail_blocks
    kept = depth * tokens * student.hidden * element if settings.activation_checkpointing else depth * block
    # The gradients of the last block lie beside all that was kept.
    activations = kept + (2 * block if settings.activation_checkpointing else block // 2)
    matching = len(work.objective.matches)
    if matching:
        activations += 3 * student.num_blocks * tokens * student.hidden * element
    gradients = 2 * _num_trained(work) if settings.precision == "bf16" else 0
    terms = {"activations": max(activations, gradients), "head": _head_bytes(work, element, tokens, place)}
    terms["heap"] = int(_HEAP[place] * sum(terms.values()))
    if work.teacher is not None:
        own = work.teacher.weight_bytes(work.dtype_bytes)
        terms["teacher"] = own + tokens * teacher_bytes(work.teacher, work.dtype_bytes, work.document_tokens)
    return terms


def block_bytes(shape: ModelShape, element: int, document_tokens: int) -> int:
    """What autograd keeps of one block for one token.

    A norm keeps its input in float32 and the normed states, and its output is kept by the linear maps that read it.
    Attention keeps queries, keys and values as they are laid out (keys and values once per query head), its output,
    and for short documents in bfloat16 the scores after the softmax. The MLP keeps gate, its activation, up, and their
    product.
    """
    norms = shape.num_norms * shape.hidden * (4 + 2 * element)
    laid = round(_PADDED * (3 if element == 2 else 4) * shape.query * element) + shape.query * element
    short = min(document_tokens, _LONG) if element == 2 or shape.is_capped else 0
    scores = round(_PADDED * shape.num_heads * short * element * (3 if shape.is_capped else 1))
    return norms + laid + scores + 4 * shape.mlp * element


def teacher_bytes(shape: ModelShape, element: int, document_tokens: int) -> int:
    """What one block holds at once for one token without gradients: the MLP's products, or the scores of attention."""
    scores = shape.num_heads * min(document_tokens, _LONG) * element * 2 if element == 2 or shape.is_capped else 0
    attention = 4 * shape.query * element + scores
    return shape.hidden * (4 + 2 * element) + max(attention, 3 * shape.mlp * element)


def _head_bytes(work: Training, element: int, tokens: int, place: Place) -> int:
    """`training.head`: chunks of logits in float32 with their softmax and gradients, and the gradient of the head."""
    vocab, hidden = work.student.vocab, work.student.hidden
    chunk = min(tokens * vocab, max(vocab, MAX_LOGITS[place]))
    logits = chunk * (4 * 3 + 2 * element)
    if work.objective.divergences:
        logits += chunk * 4 * 5  # of the teacher, and both as log-probabilities
    if tokens * vocab <= MAX_LOGITS[place]:
        return logits
    trains_head = work.lora is None
    return (
        logits
        + tokens * hidden * element
        + (vocab * hidden * (4 + (2 * element if element == 2 else 0)) if trains_head else 0)
    )
