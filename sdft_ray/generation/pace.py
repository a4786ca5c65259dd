"""How long a sampler takes for a whole set, from when it finished the responses to a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pace:
    """Seconds for a token of a prompt, for a token of a response, and for a step, in which every running response gets
    one token. A step reads all weights, so that with few responses it costs most, and with many hardly anything.
    """

    prompt_token_s: float
    token_s: float
    step_s: float

    def seconds(self, prompt_tokens: float, response_tokens: float, num_running: int) -> float:
        """For so many tokens in all, with `num_running` responses at a time."""
        steps = response_tokens / num_running
        return self.prompt_token_s * prompt_tokens + self.token_s * response_tokens + self.step_s * steps


def constant_pace(wall_s: float, prompt_tokens: Sequence[int], response_tokens: Sequence[int]) -> Pace:
    """Every token takes as long as any other: for a sampler that shows nothing of how it works."""
    each = wall_s / max(1, sum(prompt_tokens) + sum(response_tokens))
    return Pace(each, each, 0.0)


def fitted_pace(finished_s: Sequence[float], prompt_tokens: Sequence[int], response_tokens: Sequence[int]) -> Pace:
    """For continuous batching, where all responses were asked for at once and ran side by side.

    A response of n tokens is finished after all prompts, n steps, and those tokens of all responses that come in these
    steps. Three rates, none below 0, fit the times best (least squares). Falls back on `constant_pace` where they do
    not explain the time of the last response to a tenth.
    """
    from scipy.optimize import nnls

    lengths, times = np.asarray(response_tokens, float), np.asarray(finished_s, float)
    if not len(times):
        return Pace(0.0, 0.0, 0.0)
    tokens = np.minimum(lengths[:, None], lengths[None, :]).sum(axis=1)
    all_prompts = max(1, sum(prompt_tokens))
    rates, _ = nnls(np.stack([np.full(len(times), float(all_prompts)), tokens, lengths], axis=1), times)
    pace = Pace(*map(float, rates))
    told = pace.prompt_token_s * all_prompts + pace.token_s * tokens.max() + pace.step_s * lengths.max()
    if abs(told - times.max()) > 0.1 * times.max():
        return constant_pace(float(times.max()), prompt_tokens, response_tokens)
    return pace
