"""Four conditions (gates) under which a comparison of SFT with SDFT is fair; checked before any comparison.

If the references were far from the teacher's distribution, fine-tuning on them would damage even an unpruned model,
and self-distilled data would win for a reason unrelated to pruning. So the teacher must understand the annotators'
style (1), not be damaged by fine-tuning on their text (2), give it a likelihood in a middle range (3), and have scores
that can still move up or down (4).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sdft_ray.data.packing import pack
from sdft_ray.errors import DataError
from sdft_ray.lab import sets
from sdft_ray.lab.accuracy import accuracy, chat_prompt, generate, raw_accuracy
from sdft_ray.lab.documents import encode
from sdft_ray.lab.export import QUICKSTART, RECORD
from sdft_ray.lab.families import ANNOTATORS, FAMILIES, rewrite_prompt
from sdft_ray.lab.mixture import Sample
from sdft_ray.models.loading import load_model
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.training.loop import train
from sdft_ray.training.plan import arm_plan

RAW_FLOOR = 0.70
TUNED_LOSS = 0.10
MEAN_LOSS = 0.05
NLL_RANGE = (0.3, 2.5)
CEILING = 0.97
MAX_AT_CEILING = 2
FLOOR = 0.80


@dataclass(frozen=True)
class Gate:
    """One gate: its bound in words, the value per family (and annotator), and whether all are within the bound."""

    name: str
    bound: str
    values: dict[str, float]
    passed: bool


def check(
    directory: Path,
    seed_set: str = "mixed",
    *,
    learning_rate: float | None = None,
    num_items: int = 200,
    num_rows: int = 210,
    tell: Callable[[str], None] = lambda words: None,
) -> list[Gate]:
    """All four gates for the teacher in `directory` and a fine-tuning set, one of `sets.SEED_SETS`.

    Fine-tuning uses the settings of the quickstart's arm on references, except for `learning_rate` if given. Each
    family is tested on `num_items` items; the likelihood is measured on `num_rows` rows of the set. `tell` gets what is
    done next. Raises `DataError` for another set.
    """
    if seed_set not in sets.SEED_SETS:
        raise DataError(f"there is no laboratory seed set {seed_set!r}", f"choose from {', '.join(sets.SEED_SETS)}")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    teacher = load_model(directory, "bfloat16").eval()
    rows = sets.seed_rows(seed_set)
    tuned = sorted({row["family"] for row in rows})
    tell(f"the teacher answers {num_items} items of each family")
    before = family_scores(teacher, tokenizer, num_items)
    tell(f"the teacher is fine-tuned on the {len(rows):,} references of {seed_set}")
    tuned_teacher = plain_tuning(directory, tokenizer, rows, learning_rate)
    tell("the fine-tuned teacher answers them")
    after = family_scores(tuned_teacher, tokenizer, num_items)
    tell("the teacher continues documents of the annotators")
    annotators = annotator_gate(teacher, tokenizer, tuned, num_items=num_items)
    tell(f"the teacher rewrites {min(num_rows, len(rows))} references")
    surprise = surprise_gate(teacher, tokenizer, rows[:num_rows])
    return [annotators, damage_gate(before, after, tuned), surprise, level_gate(before)]


def plain_tuning(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    learning_rate: float | None = None,
) -> PreTrainedModel:
    """The unpruned teacher after the quickstart's fine-tuning on the references, in bfloat16."""
    settings = Recipe.load(QUICKSTART).train
    plain = next(name for name, arm in settings.arms.items() if arm.data == "reference")
    model = load_model(directory, "float32")
    texts = [Sample(row["instruction"], row["reference"], True, row["family"], "chat") for row in rows]
    packed = pack([encode(text, tokenizer) for text in texts], settings.max_seq_len)
    plan = arm_plan(settings, plain, Resources().train, packed.num_rows)
    train(model, packed, plan if learning_rate is None else replace(plan, learning_rate=learning_rate))
    return model.bfloat16().eval()


def plain_values(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """The gates as JSON values, figures rounded to four digits."""
    plain = [asdict(gate) for gate in gates]
    for gate in plain:
        gate["values"] = {name: round(value, 4) for name, value in gate["values"].items()}
    return plain


def record_gates(directory: Path, gates: Sequence[Gate]) -> None:
    """Write the gates into the training record of the teacher in `directory`."""
    path = directory / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(record | {"gates": plain_values(gates)}, indent=2) + "\n", encoding="utf-8")


def family_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_items: int) -> dict[str, float]:
    """Accuracy per family, in [0, 1], on its first `num_items` test items."""
    return {family: accuracy(model, tokenizer, sets.test_items(family)[:num_items]) for family in FAMILIES}


def annotator_gate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, families: Sequence[str], *, num_items: int
) -> Gate:
    """Gate 1: accuracy of at least 0.7 when the teacher continues raw documents of each annotator."""
    values = {}
    for family in families:
        items = sets.test_items(family)[:num_items]
        for annotator in ANNOTATORS:
            values[f"{family}/{annotator.name}"] = raw_accuracy(model, tokenizer, items, annotator)
    return Gate("annotators", f"each at least {RAW_FLOOR}", values, min(values.values()) >= RAW_FLOOR)


def damage_gate(before: Mapping[str, float], after: Mapping[str, float], tuned: Sequence[str]) -> Gate:
    """Gate 2: the accuracy that the *unpruned* teacher loses by fine-tuning on the references (losses are positive)."""
    values = {family: before[family] - after[family] for family in before}
    values["mean"] = sum(values.values()) / len(values)
    passed = values["mean"] < MEAN_LOSS and all(values[family] < TUNED_LOSS for family in tuned)
    bound = f"loss on each tuned family below {TUNED_LOSS}, on the mean below {MEAN_LOSS}"
    return Gate("plain_tuning_of_the_teacher", bound, values, passed)


def surprise_gate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, str]]
) -> Gate:
    """Gate 3: nats per token of the references and of the teacher's own rewrites, as chat responses."""
    prompts = [chat_prompt(rewrite_prompt(row["instruction"], row["reference"])) for row in rows]
    rewrites = generate(model, tokenizer, prompts)
    instructions = [row["instruction"] for row in rows]
    references = nats_per_token(model, tokenizer, instructions, [row["reference"] for row in rows])
    own = nats_per_token(model, tokenizer, instructions, rewrites)
    values = {"references": references, "rewrites": own}
    for family in sorted({row["family"] for row in rows}):
        chosen = [i for i, row in enumerate(rows) if row["family"] == family]
        values[f"references/{family}"] = nats_per_token(
            model, tokenizer, [instructions[i] for i in chosen], [rows[i]["reference"] for i in chosen]
        )
    low, high = NLL_RANGE
    every = [value for name, value in values.items() if name.startswith("references")]
    passed = all(low <= value <= high for value in every) and own < references
    bound = f"references within {low} to {high} nats per token, rewrites below"
    return Gate("surprise", bound, values, passed)


def level_gate(scores: Mapping[str, float]) -> Gate:
    """Gate 4: at most two families of the teacher above 97 %, none below 80 %."""
    at_ceiling = sum(score > CEILING for score in scores.values())
    passed = at_ceiling <= MAX_AT_CEILING and min(scores.values()) >= FLOOR
    bound = f"at most {MAX_AT_CEILING} above {CEILING}, none below {FLOOR}"
    return Gate("levels", bound, dict(scores), passed)


@torch.no_grad()
def nats_per_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    responses: Sequence[str],
    *,
    batch: int = 32,
) -> float:
    """Mean negative log-likelihood over all response tokens, the end-of-turn token included."""
    total, count = 0.0, 0
    pairs = [
        (
            tokenizer.encode(chat_prompt(instruction), add_special_tokens=False),
            tokenizer.encode(f"{response}{tokenizer.eos_token}", add_special_tokens=False),
        )
        for instruction, response in zip(instructions, responses, strict=True)
    ]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(pairs), batch):
        chosen = pairs[start : start + batch]
        width = max(len(prompt) + len(response) for prompt, response in chosen)
        ids_BT = torch.zeros(len(chosen), width, dtype=torch.long)
        mask_BT = torch.zeros(len(chosen), width, dtype=torch.bool)
        for row, (prompt, response) in enumerate(chosen):
            end = len(prompt) + len(response)
            ids_BT[row, :end] = torch.tensor(prompt + response)
            mask_BT[row, len(prompt) : end] = True
        # Right padding needs no attention mask: attention is causal, and padded positions are not scored.
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        scored = mask_BT[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits_BTV[scored], ids_BT[:, 1:][scored], reduction="sum")
        total += float(loss)
        count += int(scored.sum())
    return total / count
