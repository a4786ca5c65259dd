"""Parts of a recipe that say what goes in: the teacher, how it is spoken to, and sets of rows."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, model_validator

from sdft_ray.recipe.yaml_model import StrictPart

AnswerKind = Literal["number", "choice", "text", "list", "json", "function_call", "code", "callable", "none"]
"""How a response is checked (see `sdft_ray.generation.checks`); `none` means that it is not."""


def _relative_to_recipe(value: str, info: ValidationInfo) -> str:
    """Make a path absolute against the recipe's folder when something lies there; leave names alone."""
    base: Path | None = (info.context or {}).get("base")
    if base is None or "://" in value or Path(value).is_absolute():
        return value
    candidate = (base / value).resolve()
    looks_like_path = value.startswith(".") or Path(value).suffix in {".jsonl", ".parquet", ".json", ".txt"}
    return str(candidate) if looks_like_path or candidate.exists() else value


Place = Annotated[str, AfterValidator(_relative_to_recipe)]
"""A file, directory or URL, or the name of something on a hub. Relative paths start at the recipe's folder.

Identity is the digest of what lies there, never the path: `stages.sources.Sources` replaces one by the other."""


class Teacher(StrictPart):
    """The unpruned model. A hub name is pinned to the commit `revision`; a directory to its files' digest."""

    model: Place
    revision: str | None = None
    config: Place | None = None
    """A copy of the model's config.json, so that `sdft explain` can compute sizes without the Hugging Face Hub."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @model_validator(mode="before")
    @classmethod
    def _runs_no_custom_code(cls, data: Any, info: ValidationInfo) -> Any:
        """`trust_remote_code` was a field that nothing heeded; what an earlier version wrote may have it."""
        if not isinstance(data, dict) or "trust_remote_code" not in data:
            return data
        if data["trust_remote_code"] is not False and not (info.context or {}).get("stored"):
            raise ValueError("trust_remote_code is no longer a field: custom code is not run, and never was; remove it")
        return {name: value for name, value in data.items() if name != "trust_remote_code"}


def _as_date(value: Any) -> Any:
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """Lists as JSON has them; see `as_frozen`."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _for_template(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    taken = sorted(_TEMPLATE_NAMES & value.keys())
    if taken:
        raise ValueError(f"{taken[0]} is set by the service; give only what this model's template asks for")
    return value


_TEMPLATE_NAMES = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs",
    "return_assistant_tokens_mask", "strftime_now", "raise_exception", "bos_token", "eos_token",
}  # fmt: skip
"""What the service or transformers gives to a chat template."""


class Chat(StrictPart):
    """How conversations are rendered by the teacher's chat template, wherever that happens. Part of identity."""

    system: str = ""
    """The text of a system turn, for rows that have none of their own."""
    template_arguments: Annotated[dict[str, JsonValue], BeforeValidator(_plain), AfterValidator(_for_template)] = Field(
        default={}
    )
    """Further arguments of the template, for example `enable_thinking: false`."""
    date: Annotated[datetime.date, BeforeValidator(_as_date)] = datetime.date(2026, 1, 1)
    """The day that templates print which print one. It stays the same when a run goes on another day."""


class RowSource(StrictPart):
    """Rows from JSON Lines, JSON or Parquet, or a named data set (`gsm8k`, `dolly`, `alpaca_cleaned`), train split."""

    source: Place
    revision: str | None = None
    """Commit of a named set; None: the newest, which is recorded."""
    columns: dict[str, str] = Field(default={})
    """Our column (`id`, `instruction`, `context`, `reference`, `system`, `history`, `messages`, `answer_kind`, `check`,
    `family`) -> column of the source, or a place in it (`answers.text.0`); "" for none. Usual names need no mapping."""
    answer_kind: AnswerKind = "none"
    """For rows without a value of their own."""
    check: str = ""
    """Likewise: a JSON schema, Python tests, or `module:function`, as the answer kind requires."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows of the source."""
    sample: int | None = Field(default=None, ge=1)
    """At most this many of these rows, drawn by a hash of their ids and kept in order: for a source that is sorted. A
    larger sample contains the smaller ones."""


class Decontaminate(StrictPart):
    """Leave out seed rows that share `ngram` words in a row with a question of the evaluation tasks; 0 keeps all.

    13 is GPT-3's choice (arXiv:2005.14165, appendix C). For shorter questions see `sdft_ray.data.decontamination`.
    """

    ngram: int = Field(default=13, ge=0)


class SeedSet(RowSource):
    """Rows to rewrite and to train on."""

    decontaminate: Decontaminate = Decontaminate()


class Calibration(RowSource):
    """Rows used only to measure; each is truncated to `max_tokens`."""

    max_tokens: int = Field(default=2048, ge=2)


class Forgetting(RowSource):
    """Text that no model is trained on, to measure what each model has forgotten; same form as a calibration set."""

    num_rows: int = Field(default=256, ge=1)
    """Maximum number of rows to score, spread evenly over the source."""
    max_tokens: int = Field(default=1024, ge=2)
    """Each row is truncated to this many tokens."""
    embedding: Place | None = None
    """Directory or hub name of a sentence embedding model, to compare answers with those of the teacher."""
    embedding_revision: str | None = None
    """Commit of the embedding model on the hub; None: the newest."""
