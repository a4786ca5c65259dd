"""lm-eval's model interface on top of requests: the tokenizer is here, the model wherever requests are answered.

Tokenization, truncation and the handling of stop texts are those of lm-eval's `hf` model, so that scores are equal.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoConfig

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.messages import ChatSettings
from sdft_ray.errors import EvaluationError, ModelError
from sdft_ray.evaluation.pass_at_k import Samples
from sdft_ray.evaluation.progress import ItemCounter
from sdft_ray.evaluation.questions import (
    Ask,
    GenerationQuestion,
    Likelihoods,
    LoglikelihoodQuestion,
    Question,
    Text,
    key_of,
)

_DEFAULT_MAX_GEN_TOKS = 256
_Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts of context and continuation, and their token ids."""


class BatchedLM(TemplateLM):
    """An lm-eval model that sends its requests to `ask`. Tokenizer and context length come from the checkpoint.

    `num_truncated` counts the requests whose prompt was truncated at its beginning, by task; `texts` has every
    generated answer by task and item, in the order of the requests.
    """

    def __init__(
        self,
        model_dir: str | Path,
        ask: Ask,
        counter: ItemCounter | None = None,
        *,
        max_length: int | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = load_tokenizer(Path(model_dir))
        self._chat_settings = chat or ChatSettings()
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        context_length = resolve_max_length(config, self.tokenizer)
        self.max_length = context_length if max_length is None else min(context_length, max_length)
        self.num_truncated: Counter[str] = Counter()
        self.texts: defaultdict[tuple[str, int], list[Text]] = defaultdict(list)
        self._ask = ask
        self._counter = counter
        if counter is not None:
            self.set_cache_hook(counter)

    # -- lm-eval's interface -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in lm-eval: if the template refuses a system turn, it is rendered without."""

        def rendered(turns: list[dict[str, str]]) -> str:
            if add_generation_prompt:
                return self._chat.prompt_text(turns)
            settings = self._chat_settings
            return self.tokenizer.apply_chat_template(
                settings.messages(turns), tokenize=False, continue_final_message=True, **settings.for_template()
            )

        try:
            return rendered(chat_history)
        except (jinja2.TemplateError, ModelError):
            return rendered([turn for turn in chat_history if turn["role"] != "system"])

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, self._chat_settings)

    def check_chat_prompt(self) -> None:
        """Raises `ModelError` without a chat template, and when a prompt would start with two BOS tokens."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template", "add one, or evaluate with apply_chat_template: false"
            )
        ids = self.tok_encode(self.apply_chat_template([{"role": "user", "content": "Hello"}]))
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise ModelError(
                "chat prompts start with two BOS tokens in lm-eval",
                "let either the chat template or the tokenizer add it",
            )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with special tokens unless `add_special_tokens` is False or the text starts with BOS."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    # -- likelihoods -------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        self._begin(requests)
        self._tasks = [str(request.task_name) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length that each start with one known token."""
        self._begin(requests)
        pairs: list[_Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append((None, *window))
                owners.append(owner)
        self._tasks = [str(requests[owner].task_name) for owner in owners]
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[_Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Requests that differ only in their last token become one question."""
        places: defaultdict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"{self._tasks[index]}: an option has {len(continuation)} tokens, but the context has only "
                    f"{self.max_length}",
                    "leave the task out, or take a model with a longer context",
                )
            max_tokens = self.max_length + 1  # the last token is only predicted
            self.num_truncated[self._tasks[index]] += len(context) + len(continuation) > max_tokens
            whole = (context + continuation)[-max_tokens:]
            places[tuple(whole[:-1]), len(continuation) - 1].append(index)
        questions: list[Question] = []
        owners = list(places.values())
        for (ids, num_scored), indices in places.items():
            finals = dict.fromkeys(requests[index][2][-1] for index in indices)
            questions.append(LoglikelihoodQuestion(ids, num_scored, tuple(finals)))
        scores: dict[int, tuple[float, bool]] = {}
        for number, answer in self._ask(questions):
            question = questions[number]
            assert isinstance(question, LoglikelihoodQuestion)
            assert isinstance(answer, Likelihoods)
            by_final = dict(zip(question.finals, answer.finals, strict=True))
            for index in owners[number]:
                texts, _, continuation = requests[index]
                scores[index] = by_final[continuation[-1]]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, scores[index])
        return [scores[index] for index in range(len(requests))]

    # -- generation --------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop text."""
        self._begin(requests)
        questions, stops = self._writings(requests)
        for request, question in zip(requests, questions, strict=True):
            self.num_truncated[str(request.task_name)] += question.is_cut
        texts: dict[int, str] = {}
        answers: dict[int, Text] = {}
        for index, answer in self._ask(questions):
            assert isinstance(answer, Text)
            answers[index] = answer
            texts[index] = postprocess_generated_text(answer.text, stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        for index, request in enumerate(requests):
            self.texts[str(request.task_name), int(request.doc_id or 0)].append(answers[index])
        return [texts[index] for index in range(len(requests))]

    def sample(self, requests: Sequence[Instance], samples: Samples, seed: int) -> list[list[str]]:
        """`samples.num` texts for each request, at the temperature of `samples`; each has its own seed."""
        greedy, stops = self._writings(requests)
        questions = [
            replace(
                question,
                temperature=samples.temperature,
                top_p=samples.top_p,
                top_k=0,
                seed=_sample_seed(seed, question, number),
            )
            for question in greedy
            for number in range(samples.num)
        ]
        texts = [""] * len(questions)
        for index, answer in self._ask(questions):
            assert isinstance(answer, Text)
            texts[index] = postprocess_generated_text(answer.text, stops[index // samples.num], None)
        return [texts[start : start + samples.num] for start in range(0, len(texts), samples.num)]

    def _writings(self, requests: Sequence[Instance]) -> tuple[list[GenerationQuestion], list[list[str]]]:
        """The questions behind requests, and their stop texts."""
        eos = self.tokenizer.decode(self.eot_token_id)
        stops, questions = [], []
        for request in requests:
            arguments: Any = request.args
            prompt, raw = arguments
            options: dict[str, Any] = {**normalize_gen_kwargs(raw, _DEFAULT_MAX_GEN_TOKS)}
            stops.append(handle_stop_sequences(options.pop("until", None), eos=eos))
            questions.append(self._writing(request, prompt, stops[-1], options))
        return questions, stops

    def _writing(
        self, request: Instance, prompt: str, stop: Sequence[str], options: dict[str, Any]
    ) -> GenerationQuestion:
        max_tokens = options["max_gen_toks"]
        max_prompt_tokens = self.max_length - max_tokens
        if max_prompt_tokens <= 0:
            raise EvaluationError(
                f"{request.task_name} needs {max_tokens} new tokens, but the context is {self.max_length}",
                "take a model with a longer context, or set max_gen_toks in a task file of your own",
            )
        ids = self.tok_encode(prompt)
        # Special tokens end a response by themselves, and never occur in its text.
        special = set(self.tokenizer.all_special_tokens)
        sampled = options["temperature"] > 0 if options["do_sample"] is not False else False
        return GenerationQuestion(
            ids=tuple(ids[-max_prompt_tokens:]),
            is_cut=len(ids) > max_prompt_tokens,
            stop=tuple(text for text in stop if text and text not in special),
            max_tokens=max_tokens,
            temperature=float(options["temperature"]) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(options.get("top_k", 0)) if sampled else 0,
        )

    def _begin(self, requests: list[Instance]) -> None:
        if self._counter is not None:
            self._counter.begin(requests)


def _sample_seed(seed: int, question: GenerationQuestion, number: int) -> int:
    """In [0, 2**63): a hash of the question's content, never of its position."""
    digest = hashlib.sha256(f"{seed}\0{key_of(question)}\0{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
