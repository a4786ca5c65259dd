"""Estimated output size of the generate stage, from the recipe and config.json alone."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.data.signals import TokenBytes, token_bytes
from sdft_ray.models.families import Config, family_of
from sdft_ray.recipe.recipe import Generate


@dataclass(frozen=True)
class PassBytes:
    """An upper bound in bytes: every response has `max_tokens` tokens, every row `num_samples` samples, and nothing is
    compressed. `num_rows` and `total` are None if the seed set cannot be counted without a download.
    """

    num_rows: int | None
    num_samples: int
    max_tokens: int
    per_token: TokenBytes
    total: int | None


def bytes_per_token(generate: Generate, config: Config) -> TokenBytes:
    """Bytes per response token of this teacher, for each kind of output. Raises `ModelError` for a bad config."""
    spaces = family_of(config).space_sizes(config)
    return token_bytes(
        top_logprobs=generate.top_logprobs,
        hidden_states=generate.hidden_states,
        vocab_size=spaces["vocab"],
        hidden_size=spaces["hidden"],
    )


def pass_bytes(generate: Generate, config: Config, num_rows: int | None) -> PassBytes:
    """The upper bound for a seed set of `num_rows` rows."""
    each = bytes_per_token(generate, config)
    row = each.total * generate.max_tokens * generate.num_samples
    total = None if num_rows is None else num_rows * row
    return PassBytes(num_rows, generate.num_samples, generate.max_tokens, each, total)
