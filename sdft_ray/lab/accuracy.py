"""A fast evaluation of the laboratory's tests: batched, greedy, zero-shot.

It monitors the teacher during training and computes the gates. Published results come from lm-eval, which
scores these tests in the same way (options by the sum of their log-probabilities).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft_ray.lab.families import Item
from sdft_ray.lab.families.item import Annotator, read_answer

MAX_NEW_TOKENS = 128


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> float:
    """Accuracy on the exam questions, in [0, 1]: by likelihood of the options, or by the generated answer."""
    if items[0].options:
        return sum(_choices(model, tokenizer, items)) / len(items)
    prompts = [chat_prompt(item.exam) for item in items]
    replies = generate(model, tokenizer, prompts)
    return sum(_right(i, r) for i, r in zip(items, replies, strict=True)) / len(items)


def raw_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], annotator: Annotator
) -> float:
    """Accuracy when the model continues the annotator's raw documents, without a chat template; in [0, 1]."""
    begin = str(tokenizer.bos_token)
    replies = generate(model, tokenizer, [begin + annotator.prompt(item.question) for item in items])
    return sum(_right(i, r) for i, r in zip(items, replies, strict=True)) / len(items)


def _right(item: Item, reply: str) -> bool:
    return read_answer(item.answer_kind, reply) == item.answer


def chat_prompt(instruction: str) -> str:
    """One user turn and the start of the assistant turn, in the laboratory's chat template."""
    return f"<|begin|><|user|>{instruction}<|end|><|assistant|>"


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch: int = 100,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Greedy continuations of prompts that include their special tokens, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        ids_BT = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        texts = tokenizer.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            replies[i] = text.strip()
    return replies


@torch.no_grad()
def _choices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], batch: int = 64
) -> list[bool]:
    rows = [(tokenizer.encode(chat_prompt(item.exam), add_special_tokens=False), item) for item in items]
    right = []
    for start in range(0, len(rows), batch):
        scores = iter(_scores(model, tokenizer, rows[start : start + batch]))
        for _, item in rows[start : start + batch]:
            mine = [next(scores) for _ in item.options]
            right.append(mine.index(max(mine)) == item.gold)
    return right


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[list[int], Item]]
) -> list[float]:
    sequences, starts = [], []
    for prompt, item in rows:
        for option in item.options:
            sequences.append(prompt + tokenizer.encode(option, add_special_tokens=False))
            starts.append(len(prompt))
    width = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), width), int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
    first = min(starts) - 1
    # Right padding needs no mask: attention is causal, and padded positions are not scored.
    logits_BTV = model(input_ids=ids_BT, logits_to_keep=width - first).logits.float()
    logprobs_BTV = logits_BTV.log_softmax(-1)
    scores = []
    for row, (sequence, begin) in enumerate(zip(sequences, starts, strict=True)):
        where = range(begin, len(sequence))
        scores.append(sum(float(logprobs_BTV[row, t - 1 - first, sequence[t]]) for t in where))
    return scores
