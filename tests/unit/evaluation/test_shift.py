"""The distribution gap: likelihoods against transformers' own loss, errors against numpy, and the words."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.packing import Document
from sdft_ray.data.subset import spread
from sdft_ray.errors import ModelError
from sdft_ray.evaluation.recovery import Estimate
from sdft_ray.evaluation.shift import ResponseNll, Shift, mean_nll, paired_gap, response_nll, shift, verdict
from tests.support.tiny import EOS_ID, FAMILIES, build_model, make_tokenizer

PAIRS = [
    ("what is 2 plus 2", "it is 4"),
    ("who is taller, Ann or Tom?", "Ann is taller than Tom. The answer is Ann, and that is all there is to say."),
    ("sort the list: pear, fig, plum. " * 3, "fig"),
    ("hi", "Tom has 12 apples and gives 5 to Ann: 12 - 5 = 7 #### 7"),
    ("how many apples are left", "7"),
]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    chat = ChatFormat(load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))))
    return [chat.encode(instruction, response) for instruction, response in PAIRS]


@torch.no_grad()
def naive(model: Any, document: Document) -> float:
    """One conversation alone: transformers' mean loss over the labels, times their number."""
    ids, labels = torch.tensor([document.ids]), torch.tensor([document.ids])
    labels[~torch.tensor([document.loss_mask])] = -100
    return float(model(input_ids=ids, labels=labels).loss) * sum(document.loss_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_transformers(family: str, documents: list[Document]) -> None:
    softcap: dict[str, Any] = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model = build_model(family, **softcap)
    found = response_nll(model, documents, batch_tokens=256)
    assert [row.nats for row in found] == pytest.approx([naive(model, document) for document in documents], rel=1e-5)
    assert [row.num_tokens for row in found] == [sum(document.loss_mask) for document in documents]


def test_the_end_of_turn_counts_and_the_prompt_does_not(documents: list[Document]) -> None:
    model: Any = build_model()
    document = documents[-1]
    assert document.ids[-1] == EOS_ID
    scored = [t for t, marked in enumerate(document.loss_mask) if marked]
    assert scored[-1] == len(document.ids) - 1
    with torch.no_grad():
        log_probs_TV = model(input_ids=torch.tensor([document.ids])).logits[0].log_softmax(-1)
    by_hand = -sum(float(log_probs_TV[t - 1, document.ids[t]]) for t in scored)
    (found,) = response_nll(model, [document])
    assert found.nats == pytest.approx(by_hand, rel=1e-5)
    assert found.num_tokens == len(scored)


@pytest.mark.parametrize("batch_tokens", [1, 130, 300, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_batch_size_does_not_matter(batch_tokens: int, dtype: str, documents: list[Document]) -> None:
    model = build_model(dtype=dtype)
    alone = [response_nll(model, [document])[0] for document in documents]
    found = response_nll(model, documents, batch_tokens=batch_tokens)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert [row.nats for row in found] == pytest.approx([row.nats for row in alone], rel=tolerance)


def test_no_batch_holds_more_positions_than_asked(documents: list[Document]) -> None:
    model: Any = build_model()
    sizes: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _m, _a, kw: sizes.append(kw["input_ids"].numel()), with_kwargs=True
    )
    longest = max(len(document.ids) for document in documents)
    told: list[tuple[int, int]] = []
    response_nll(model, documents, batch_tokens=longest, on_batch=lambda done, total: told.append((done, total)))
    assert max(sizes) <= longest
    assert 1 < len(sizes) < len(documents)
    assert len(told) == len(sizes)
    assert told[-1] == (len(documents), len(documents))


def test_logits_that_are_not_finite_are_refused(documents: list[Document]) -> None:
    model: Any = build_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        response_nll(model, documents)


def test_nothing_to_score() -> None:
    assert response_nll(build_model(), []) == []


@pytest.mark.parametrize(("num_rows", "num_wanted"), [(0, 5), (3, 5), (5, 5), (10, 4), (824, 512), (7, 1)])
def test_rows_are_spread_evenly(num_rows: int, num_wanted: int) -> None:
    chosen = spread(num_rows, num_wanted)
    assert len(chosen) == min(num_rows, num_wanted)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(num_rows))
    assert len(set(np.diff(chosen).tolist())) <= 2, "steps differ by one at most"


def made_up(seed: int, *, num_rows: int = 400, gap: float = 0.3) -> tuple[list[ResponseNll], list[ResponseNll]]:
    """Two texts of the same rows, of different lengths, with a share of the difficulty in common."""
    rng = random.Random(seed)
    first, second = [], []
    for _ in range(num_rows):
        hard = rng.gauss(1.5, 0.4)
        for rows, level in ((first, hard + gap), (second, hard)):
            num_tokens = rng.randint(3, 40)
            rows.append(ResponseNll(sum(rng.gauss(level, 0.5) for _ in range(num_tokens)), num_tokens))
    return first, second


def test_with_equal_lengths_the_errors_are_the_plain_ones() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.0, 0.5, 50), rng.normal(1.0, 0.5, 50)
    first, second = ([ResponseNll(8 * value, 8) for value in values] for values in (a, b))
    for found, expected in ((mean_nll(first), a), (paired_gap(first, second), a - b)):
        assert found.value == pytest.approx(expected.mean())
        assert found.stderr == pytest.approx(expected.std(ddof=1) / 50**0.5)


def test_errors_are_those_of_a_bootstrap_over_rows() -> None:
    first, second = made_up(0)
    a, b = np.array(first), np.array(second)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(a), size=(2000, len(a)))
    mean = a[drawn, 0].sum(1) / a[drawn, 1].sum(1)
    gap = mean - b[drawn, 0].sum(1) / b[drawn, 1].sum(1)
    assert mean_nll(first).value == pytest.approx(a[:, 0].sum() / a[:, 1].sum())
    assert mean_nll(first).stderr == pytest.approx(mean.std(), rel=0.06)
    assert paired_gap(first, second).stderr == pytest.approx(gap.std(), rel=0.06)


def test_pairing_takes_out_what_both_texts_share() -> None:
    first, second = made_up(1)
    apart = np.hypot(mean_nll(first).stderr or 0, mean_nll(second).stderr or 0)
    assert (paired_gap(first, second).stderr or 0) < 0.8 * apart
    assert paired_gap(first, first) == Estimate(0.0, 0.0)


def teacher_gap(gap: float, stderr: float | None) -> Shift:
    return Shift(100, {}, {"teacher": Estimate(gap, stderr), "pruned": Estimate(-gap, stderr)})


@pytest.mark.parametrize(
    ("gap", "stderr", "figure", "words"),
    [
        (0.393, 0.021, "0.393 ± 0.021", "rewriting is likely to pay"),
        (0.043, 0.021, "0.043 ± 0.021", "rewriting is likely to pay"),
        (0.042, 0.021, "0.042 ± 0.021", "rewriting will hardly pay"),
        (-0.01, 0.4, "\u22120.01 ± 0.40", "rewriting will hardly pay"),
        (0.0, 0.0, "0.000 ± 0.000", "rewriting will hardly pay"),
        (-0.0004, 0.00012, "0.00040 ± 0.00012", "check the rewriting template"),
    ],
)
def test_verdict(gap: float, stderr: float, figure: str, words: str) -> None:
    said = verdict(teacher_gap(gap, stderr))
    assert f"{figure} nats per token" in said
    assert words in said
    assert "two standard errors" in said


def test_verdict_without_rows_or_errors() -> None:
    assert shift({}) == shift({"teacher": {"reference": [], "distilled": []}}) == Shift(0, {}, {})
    assert "No rewrite was kept" in verdict(shift({}))
    assert "no standard error" in verdict(teacher_gap(0.5, None))


def test_four_figures_and_two_gaps() -> None:
    (first, second), (third, fourth) = made_up(2), made_up(3, gap=-0.2)
    figures = shift(
        {
            "teacher": {"reference": first, "distilled": second},
            "pruned": {"reference": third, "distilled": fourth},
        }
    )
    assert figures.num_rows == 400
    assert figures.nll["pruned"] == {"reference": mean_nll(third), "distilled": mean_nll(fourth)}
    assert figures.gaps == {"teacher": paired_gap(first, second), "pruned": paired_gap(third, fourth)}
    assert "likely to pay" in verdict(figures)


def test_one_row_has_no_error() -> None:
    row = [ResponseNll(3.0, 2)]
    assert mean_nll(row) == Estimate(1.5, None)
    assert paired_gap(row, [ResponseNll(1.0, 2)]) == Estimate(1.0, None)
