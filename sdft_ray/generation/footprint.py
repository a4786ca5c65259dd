"""How many bytes the teacher's pass will write, from the recipe and a config.json alone."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.data.signals import TokenBytes, token_bytes
from sdft_ray.models.families import Config, family_of
from sdft_ray.recipe.recipe import Generate


@dataclass(frozen=True)
class PassBytes:
    """An upper bound: every response as long as `max_tokens`, every row asked `num_samples` times, nothing
    compressed. `num_rows` and `total` are None where the seed set cannot be counted without fetching it.
    """

    num_rows: int | None
    num_samples: int
    max_tokens: int
    per_token: TokenBytes
    total: int | None


def bytes_per_token(generate: Generate, config: Config) -> TokenBytes:
    """What a response token of this teacher takes, product by product. Raises `ModelError` for a bad config."""
    spaces = family_of(config).space_sizes(config)
    return token_bytes(
        top_logprobs=generate.top_logprobs,
        hidden_states=generate.hidden_states,
        vocab_size=spaces["vocab"],
        hidden_size=spaces["hidden"],
    )


def pass_bytes(generate: Generate, config: Config, num_rows: int | None) -> PassBytes:
    """The whole pass over a seed set."""
    each = bytes_per_token(generate, config)
    row = each.total * generate.max_tokens * generate.num_samples
    total = None if num_rows is None else num_rows * row
    return PassBytes(num_rows, generate.num_samples, generate.max_tokens, each, total)
