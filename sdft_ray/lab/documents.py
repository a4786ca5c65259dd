"""Training texts as token sequences: chats in the format of the chat template, human documents without it."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from sdft_ray.data.packing import Document
from sdft_ray.lab.accuracy import chat_prompt
from sdft_ray.lab.mixture import Sample, samples


def encode(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Tokenize a text. The loss mask covers the response and its end token."""
    if sample.chat:
        prompt, response = chat_prompt(sample.prompt), sample.response
    else:
        prompt, response = f"{tokenizer.bos_token}{sample.prompt}", f" {sample.response}"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    response_ids = tokenizer.encode(f"{response}{tokenizer.eos_token}", add_special_tokens=False)
    mask = [False] * len(prompt_ids) + [True] * len(response_ids)
    return Document(prompt_ids + response_ids, mask)


def documents(
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    longest: int,
    seed: str,
    reserved: Collection[str],
) -> list[Document]:
    """Documents of the mixture, until they have `num_tokens` in total; those longer than `longest` are skipped."""
    result: list[Document] = []
    total = 0
    for sample in samples(seed, reserved):
        document = encode(sample, tokenizer)
        if len(document.ids) > longest:
            continue
        result.append(document)
        total += len(document.ids)
        if total >= num_tokens:
            return result
    return result
