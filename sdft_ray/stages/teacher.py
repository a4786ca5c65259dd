"""The teacher of a recipe: where it lies, and what is known of it, looked up once and handed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.data.messages import ChatSettings
from sdft_ray.models.description import ModelDescription
from sdft_ray.models.source import ModelSource, read_config, resolve_source
from sdft_ray.recipe.inputs import Chat, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sdft_ray.data.chat import ChatFormat


@dataclass(frozen=True)
class TeacherModel:
    """The teacher of a recipe, resolved once. What is expensive is read on first use, and does not travel with it."""

    name: str
    """As the recipe has it: a directory or a hub name."""
    source: ModelSource
    dtype: str
    config_copy: str | None = None
    """The recipe's copy of the config, for a hub model that is not at hand."""
    chat_settings: ChatSettings = field(default_factory=ChatSettings)

    @classmethod
    def of(cls, teacher: Teacher, chat: Chat) -> TeacherModel:
        """Raises `ModelError` for a model that is neither a directory nor a hub name with a commit."""
        source = resolve_source(teacher.model, teacher.revision)
        settings = ChatSettings(chat.system, chat.template_arguments, chat.date)
        return cls(teacher.model, source, teacher.dtype, teacher.config, settings)

    @cached_property
    def described(self) -> ModelDescription | None:
        """From the directory, the hub's cache or the recipe's copy; None where the config is out of reach."""
        config = read_config(self.source, self.config_copy)
        return None if config is None else ModelDescription(config)

    @cached_property
    def fetched(self) -> ModelDescription:
        """From the files themselves; downloads a hub model."""
        return ModelDescription.of(self.directory)

    @cached_property
    def directory(self) -> Path:
        """See `ModelSource.fetch`."""
        return self.source.fetch()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Imports transformers. Raises `ModelError` for one that cannot be loaded."""
        from sdft_ray.data.chat import load_tokenizer

        return load_tokenizer(self.directory)

    @cached_property
    def chat(self) -> ChatFormat:
        """Its chat template. Raises `ModelError` where it has none."""
        from sdft_ray.data.chat import ChatFormat

        return ChatFormat(self.tokenizer, self.chat_settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherModel, (self.name, self.source, self.dtype, self.config_copy, self.chat_settings)
