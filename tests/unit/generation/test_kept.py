"""How many rewrites are kept, when a share is refused, and in what words."""

from __future__ import annotations

import numpy as np
import pytest

from sdft_ray.errors import DataError
from sdft_ray.generation.kept import Kept, chosen

ROW = {
    "example_id": "r1",
    "instruction": "What is one and one?",
    "context": "",
    "reference_response": "#### 2",
    "answer_kind": "number",
    "check": "",
}


def kept(num_kept: int, **others: int) -> Kept:
    found = Kept()
    for reason, number in {"kept": num_kept, **others}.items():
        for index in range(number):
            text = f"{reason} text {index} " + "and so on " * 20
            found.add({"example_id": f"{reason}-{index}", "distilled_response": text, "reason": reason})
    return found


def test_the_first_sample_that_passes_is_chosen() -> None:
    samples = [{"response": text, "finish_reason": "stop"} for text in ("#### 3", "so #### 2", "it is #### 2")]
    row = chosen(ROW, samples, lambda row, response: True)
    assert (row["source"], row["response"], row["reason"]) == ("distilled", "so #### 2", "kept")
    row = chosen(ROW, samples[:1], lambda row, response: True)
    assert (row["source"], row["response"], row["reason"]) == ("reference", "#### 2", "mismatch")
    assert chosen(ROW, samples, lambda row, response: False)["reason"] == "too_long"


def test_examples_are_of_different_reasons_and_short() -> None:
    found = kept(5, mismatch=1, no_answer=9).examples()
    assert [text.split(":")[0] for text in found] == ["no_answer-0", "mismatch-0", "no_answer-1"]
    assert all(len(text) < 100 and "\n" not in text for text in found)
    assert found[1].endswith("(mismatch)")


def test_a_share_that_is_too_small_at_the_end_is_refused_and_one_that_is_just_enough_is_not() -> None:
    kept(25, mismatch=75).check_share(0.25)
    with pytest.raises(DataError) as caught:
        kept(24, no_answer=60, truncated=16).check_share(0.25)
    assert caught.value.message.startswith(
        "24 of 100 rewrites were kept, and the resources ask for 25 % (generate.min_kept): "
        "60 no_answer, 24 kept, 16 truncated; for example "
    )
    assert 'no_answer-0: "no_answer text 0' in caught.value.message
    assert "sdft try RECIPE" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_the_next_step_is_about_the_most_frequent_reason_but_kept() -> None:
    with pytest.raises(DataError) as caught:
        kept(20, truncated=70, no_answer=10).check_share(0.25)
    assert caught.value.hint.startswith("raise generate.max_tokens")


def test_a_sample_stops_a_generation_only_where_it_is_sure() -> None:
    kept(10, no_answer=54).check_sample(0.25, 16)  # 16 %: three standard errors are not enough for 16 looks
    with pytest.raises(DataError, match="generation is stopped: 2 of the first 64 rewrites"):
        kept(2, no_answer=62).check_sample(0.25, 16)


def test_a_generation_with_enough_is_hardly_ever_stopped() -> None:
    """10,000 generations of which just the share that is asked for is kept, looked at 16 times each."""
    draws = np.random.default_rng(0).random((10_000, 16, 64)) < 0.25
    counts = draws.sum(axis=2).cumsum(axis=1)
    lowest = {}
    for look in range(16):
        total = 64 * (look + 1)
        lowest[look] = max(k for k in range(total) if _stops(k, total))
    stopped = np.any([counts[:, look] <= lowest[look] for look in range(16)], axis=0)
    assert stopped.mean() < 0.01


def _stops(num_kept: int, total: int) -> bool:
    try:
        kept_counts = Kept()
        kept_counts.reasons.update({"kept": num_kept, "no_answer": total - num_kept})
        kept_counts._examples["no_answer"] = ["r: text"]
        kept_counts.check_sample(0.25, 16)
    except DataError:
        return True
    return False
