"""What models have lost: likelihoods of whole texts against a naive loop, differences against numpy, and the words."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sdft_ray.data.calibration import row_documents
from sdft_ray.data.chat import load_tokenizer
from sdft_ray.data.example import SEED_SCHEMA
from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.forgetting import Forgetting, forgetting, perplexity_ratio, verdict
from sdft_ray.evaluation.recovery import Estimate
from sdft_ray.evaluation.shift import ResponseNll, response_nll
from tests.support.tiny import build_model, make_tokenizer

PLAIN = ["Tom has 12 apples and gives 5 to Ann.", "7", "Sort the list: pear, fig, plum. " * 4, "Who is taller?"]


def table(rows: list[tuple[str, str]]) -> pa.Table:
    columns = [(f"r{i}", instruction, "", reference, "none", "", "") for i, (instruction, reference) in enumerate(rows)]
    return pa.Table.from_pylist([dict(zip(SEED_SCHEMA.names, row, strict=True)) for row in columns], SEED_SCHEMA)


@torch.no_grad()
def naive(model: Any, ids: list[int], scored: range) -> float:
    """One token after the other, each from its own prefix."""
    total = 0.0
    for t in scored:
        log_probs_V = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)
        total -= float(log_probs_V[ids[t]])
    return total


def test_plain_text_is_scored_from_its_second_token_on_and_a_conversation_in_its_answer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    model = build_model()
    rows = [("", text) for text in PLAIN] + [("how many", "it is 4")]
    documents = row_documents(table(rows), tokenizer, max_tokens=24)
    found = response_nll(model, documents, batch_tokens=60)
    for text, document, nll in zip(PLAIN, documents, found, strict=False):
        ids = tokenizer(text)["input_ids"][:24]
        assert document.ids == ids
        assert nll.num_tokens == len(ids) - 1
        assert nll.nats == pytest.approx(naive(model, ids, range(1, len(ids))), rel=1e-5)
    answered, prompt = documents[-1], len(documents[-1].loss_mask) - sum(documents[-1].loss_mask)
    assert found[-1].num_tokens == len(answered.ids) - prompt < len(answered.ids) - 1
    expected = naive(model, answered.ids, range(prompt, len(answered.ids)))
    assert found[-1].nats == pytest.approx(expected, rel=1e-5)


LEVELS = {"teacher": 1.5, "pruned": 2.4, "sft": 2.0, "sdft": 1.52}


def made_up(num_rows: int = 60, seed: int = 0) -> dict[str, dict[str, dict[str, ResponseNll]]]:
    """What makes a row hard is hard for all models; each lists the rows in an order of its own."""
    rng = random.Random(seed)
    rows = {model: {text: {} for text in ("text", "reference")} for model in LEVELS}
    for text in ("text", "reference"):
        for i in range(num_rows):
            num_tokens, hard = rng.randint(5, 60), rng.gauss(0, 0.5)
            for model, level in LEVELS.items():
                nats = num_tokens * (level + hard + rng.gauss(0, 0.1))
                rows[model][text][f"r{i}"] = ResponseNll(nats, num_tokens)
    shuffled = list(rows["sft"]["text"].items())
    rng.shuffle(shuffled)
    rows["sft"]["text"] = dict(shuffled)
    return rows


def columns(rows: dict[str, ResponseNll]) -> tuple[np.ndarray, np.ndarray]:
    ordered = [rows[f"r{i}"] for i in range(len(rows))]
    return np.array([row.nats for row in ordered]), np.array([row.num_tokens for row in ordered])


@pytest.mark.parametrize("text", ["text", "reference"])
def test_means_and_paired_differences(text: str) -> None:
    rows = made_up()
    found = forgetting(rows)
    assert found.num_rows == {"text": 60, "reference": 60}
    means = {model: columns(rows[model][text])[0].sum() / columns(rows[model][text])[1].sum() for model in rows}
    for model in rows:
        assert found.nll[model][text].value == pytest.approx(means[model])
    asked = [(found.to_teacher, model, "teacher") for model in ("pruned", "sft", "sdft")]
    asked += [(found.to_pruned, model, "pruned") for model in ("sft", "sdft")]
    for told, model, base in asked:
        (a, t), (b, _) = columns(rows[model][text]), columns(rows[base][text])
        moves = (a - b - (means[model] - means[base]) * t) / t.sum()
        assert told[model][text].value == pytest.approx(means[model] - means[base])
        assert told[model][text].stderr == pytest.approx(np.sqrt(60 / 59 * (moves**2).sum()))
    assert set(found.to_pruned) == {"sft", "sdft"}
    assert set(found.to_teacher) == {"pruned", "sft", "sdft"}


def test_pairing_makes_differences_sharp() -> None:
    found = forgetting(made_up())
    apart = math.hypot(found.nll["sft"]["text"].stderr or 0, found.nll["teacher"]["text"].stderr or 0)
    assert (found.to_teacher["sft"]["text"].stderr or 1) < 0.4 * apart


def test_the_ratio_of_perplexities_has_the_error_of_a_bootstrap() -> None:
    rows = made_up(num_rows=200)
    (a, t), (b, _) = columns(rows["sft"]["text"]), columns(rows["teacher"]["text"])
    drawn = np.random.default_rng(0).integers(200, size=(2000, 200))
    ratios = np.exp(a[drawn].sum(1) / t[drawn].sum(1)) / np.exp(b[drawn].sum(1) / t[drawn].sum(1))
    found = forgetting(rows).perplexity_ratio["sft"]
    assert found.value == pytest.approx(math.exp(a.sum() / t.sum()) / math.exp(b.sum() / t.sum()))
    assert found.stderr == pytest.approx(ratios.std(), rel=0.08)
    assert perplexity_ratio(Estimate(0.0, None)) == Estimate(1.0, None)
    assert perplexity_ratio(Estimate(1e4, 1.0)) == Estimate(None, None)


def test_other_rows_are_refused() -> None:
    rows = made_up()
    del rows["sft"]["reference"]["r3"]
    with pytest.raises(EvaluationError, match="sft and the teacher were not scored on the same rows of references"):
        forgetting(rows)
    rows["sft"]["reference"]["r1000"] = ResponseNll(1.0, 1)
    with pytest.raises(EvaluationError, match="same rows"):
        forgetting(rows)


def test_a_kind_without_rows_is_left_out() -> None:
    rows = {model: {"text": texts["text"], "reference": {}} for model, texts in made_up().items()}
    found = forgetting(rows)
    assert set(found.num_rows) == set(found.nll["sft"]) == {"text"}
    assert verdict(found, "reference") == ""


def found_of(pruned: float, sft: float, stderr: float | None = 0.01, *, num_rows: int = 9) -> Forgetting:
    """Differences to the teacher as they are; those to the pruned model follow."""

    def of(value: float) -> dict[str, Estimate]:
        return {"text": Estimate(value, stderr)}

    to_teacher = {"pruned": of(pruned), "sft": of(sft)}
    ratios = {model: perplexity_ratio(texts["text"]) for model, texts in to_teacher.items()}
    return Forgetting({"text": num_rows}, {}, to_teacher, {"sft": of(sft - pruned)}, ratios)


@pytest.mark.parametrize(
    ("pruned", "sft", "says"),
    [
        (0.5, 0.2, "Pruning made held-out text 0.500 ± 0.010 nats per token more surprising (perplexity × 1.65), "
                   "beyond two standard errors. sft gave back 0.300 ± 0.010 and stays 0.200 ± 0.010 above the "
                   "teacher."),
        (0.5, 0.6, "sft took a further 0.100 ± 0.010 and stays 0.600 ± 0.010 above the teacher."),
        (0.5, 0.505, "sft changed nothing measurable and stays 0.505 ± 0.010 above the teacher."),
        (0.5, 0.02, "sft gave back 0.480 ± 0.010 and is level with the teacher within two standard errors."),
        (0.5, 0.021, "and stays 0.021 ± 0.010 above the teacher."),
        (0.5, -0.1, "sft gave back 0.600 ± 0.010 and is 0.100 ± 0.010 below the teacher."),
        (0.02, 0.1, "Pruning made held-out text neither more nor less surprising within two standard errors. "
                    "sft lost 0.080 ± 0.010 and stays 0.100 ± 0.010 above the teacher."),
        (0.02, -0.1, "sft came nearer by 0.120 ± 0.010 and is 0.100 ± 0.010 below the teacher."),
        (-0.05, -0.05, "Pruning made held-out text 0.050 ± 0.010 nats per token less surprising (perplexity × 0.951)"),
    ],
)  # fmt: skip
def test_verdict(pruned: float, sft: float, says: str) -> None:
    assert says in verdict(found_of(pruned, sft), "text")


def test_verdict_without_errors_or_without_a_pruned_model() -> None:
    assert "A single row has no standard error" in verdict(found_of(0.5, 0.2, None, num_rows=1), "text")
    rows = made_up()
    del rows["pruned"]
    said = verdict(forgetting(rows), "text")
    assert "Pruning" not in said
    assert said.startswith(f"sft stays {forgetting(rows).to_teacher['sft']['text'].value:.3f} ± ")
