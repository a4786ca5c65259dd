"""Memory of an inference engine: weights, keys and values, and what one step of it computes.

Channels D hidden, Q of all query heads, M of the MLP; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.planning.need import CUDA_CONTEXT, TORCH_PROCESS, VLLM_PROCESS, Need, Place, peak
from sdft_ray.planning.shape import ModelShape

STEP_TOKENS = 4096
"""`generation.vllm_arguments._AT_LEAST`: the least of a step's tokens that vLLM is given on a CPU."""
_GPU_STEP_TOKENS = 8192
"""vLLM's own default of `max_num_batched_tokens` for offline use on a GPU (0.32)."""
KV_BLOCK_TOKENS = 128
"""vLLM gives keys and values room in blocks of so many tokens on a CPU, of 16 on a GPU (0.32)."""
SCORE_TOKENS = 8192
"""`generation.scoring.score`: positions of a pass that scores, in the transformers engine."""


@dataclass(frozen=True)
class Work:
    """What an engine is asked at most at once.

    `prompt_tokens` and `new_tokens` are those of the longest sequence, `scored_tokens` the longest prompt whose tokens
    are scored (0: none), `num_sequences` how many are in a batch, `all_tokens` an upper bound of what all sequences
    together have, None where it is not known: keys and values are only touched as far as they are used.
    """

    num_sequences: int
    prompt_tokens: int
    new_tokens: int
    scored_tokens: int = 0
    all_tokens: int | None = None
    samples: bool = False
    """Whether tokens are drawn, and not the likeliest taken."""


def step_tokens(context_tokens: int, *, on_gpu: bool) -> int:
    """Most tokens of one step of vLLM as `generation.vllm_arguments` sets it."""
    return _GPU_STEP_TOKENS if on_gpu else max(STEP_TOKENS, context_tokens)


def whole_blocks(context_tokens: int) -> int:
    """Tokens of keys and values that a sequence of this length takes."""
    return -(-context_tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def least_cache_tokens(context_tokens: int) -> int:
    """Tokens of a KV cache that is to hold one sequence of this length: vLLM never fills one block (0.32)."""
    return whole_blocks(context_tokens) + KV_BLOCK_TOKENS


def vllm_need(
    shape: ModelShape, element: int, work: Work, *, kv_cache_bytes: int, context_tokens: int, on_gpu: bool = False
) -> Need:
    """vLLM's engine in one process. `element` is the bytes of a weight in its dtype.

    A step computes the prompts of new sequences: of each token the two products of the MLP and their combination, or
    queries, keys, values and attention's output, beside the residual stream. The tokens that are scored go through the
    head one sequence at a time: logits, log-probabilities in float32, and a mask of those that rank above.
    """
    place: Place = "GPU memory" if on_gpu else "memory"
    steps = step_tokens(context_tokens, on_gpu=on_gpu)
    tokens = min(steps, max(1, work.num_sequences) * max(work.prompt_tokens, work.scored_tokens, 1))
    of_token = 3 * shape.hidden + max(3 * shape.mlp, 2 * shape.query + 2 * shape.key)
    kv_bytes = kv_cache_bytes
    if work.all_tokens is not None and not on_gpu:
        kv_bytes = min(kv_bytes, work.all_tokens * shape.kv_bytes(element))
    terms = {
        "process": CUDA_CONTEXT if on_gpu else VLLM_PROCESS,
        "weights": shape.weight_bytes(element),
        "keys and values": kv_bytes,
        "activations": tokens * of_token * element,
        "logits": max(
            work.scored_tokens * shape.vocab * (element + 5),
            work.num_sequences * shape.vocab * (element + 4 * (3 if work.samples else 2)),
        ),
    }
    return Need(terms, place)


def transformers_need(shape: ModelShape, element: int, work: Work, *, on_gpu: bool = False) -> Need:
    """The transformers engine: a batch of sequences padded to the longest, or passes that score without a cache.

    Growing the cache copies the keys and values of one block. Tokens are drawn from logits with their order and noise
    in float64; scored tokens keep the logits of all rows of a pass, and log-probabilities of one row.
    """
    place: Place = "GPU memory" if on_gpu else "memory"
    base = {"process": CUDA_CONTEXT if on_gpu else TORCH_PROCESS, "weights": shape.weight_bytes(element)}
    phases = [base]
    if work.prompt_tokens or work.new_tokens:
        rows, length = work.num_sequences, work.prompt_tokens + work.new_tokens
        cache = rows * length * shape.kv_bytes(element)
        prefill = rows * work.prompt_tokens * forward_bytes(shape, element)
        prefill += rows * work.prompt_tokens**2 * (element + 1)  # the mask of padded rows
        phases.append(
            {
                **base,
                "keys and values": cache + cache // max(1, shape.num_blocks),
                "activations": prefill,
                "logits": rows * shape.vocab * (element + 4 + (40 if work.samples else 0)),
            }
        )
    if work.scored_tokens:
        rows = max(1, SCORE_TOKENS // work.scored_tokens)
        tokens = rows * work.scored_tokens
        phases.append(
            {
                **base,
                "activations": tokens * forward_bytes(shape, element),
                "logits": (tokens // 2 + 1) * shape.vocab * element + work.scored_tokens * shape.vocab * 8,
            }
        )
    return Need(peak(*phases), place)


def forward_bytes(shape: ModelShape, element: int) -> int:
    """Of one token in one block: the residual stream and a norm in float32, and the MLP's products or attention's."""
    return shape.hidden * (8 + 2 * element) + element * max(3 * shape.mlp, 4 * shape.query)
