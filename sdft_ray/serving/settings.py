"""What a service consists of: models, engines, who may ask, how much, where it listens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from sdft_ray.engines.settings import EngineSettings
from sdft_ray.errors import ServeError
from sdft_ray.recipe.yaml_model import StrictPart, as_frozen, describe_validation_error, read_yaml


class Limits(StrictPart):
    """What one request may ask for, and how many may ask at once."""

    max_body_bytes: int = Field(default=2 * 2**20, ge=1024)
    body_timeout_s: float = Field(default=20.0, gt=0)
    """A body that takes longer to arrive is refused."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Waiting and answering together."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int = Field(default=4096, ge=1)
    max_running: int = Field(default=128, ge=1)
    """Answers that a replica makes at a time, model by model; more than the engine decodes together keep it busy."""
    max_queued: int = Field(default=512, ge=0)
    """Answers that wait for their turn before more are refused with 429."""


class Access(StrictPart):
    """Who may ask. With neither keys nor `allow_anonymous` the service does not start beyond loopback."""

    keys_file: str | None = None
    """YAML of hashed keys; made and edited by `sdft keys`."""
    keys_variable: str = "SDFT_API_KEYS"
    """Environment variable of the replicas with ID:SHA256 pairs parted by commas."""
    allow_anonymous: bool = False
    local_hosts_only: bool = False
    """Refuse names other than localhost, so that no web page reaches a service without keys under a name of its own."""
    cors_origins: tuple[str, ...] = ()
    """Pages of other origins that may ask from a browser; none by default."""


class Draft(StrictPart):
    """A smaller model that proposes tokens, which the model then checks all at once; the answer stays its own."""

    source: str
    num_tokens: int = Field(default=4, ge=1, le=16)


class ServedModel(StrictPart):
    """One model by the name that clients call it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+/-]{0,127}$")
    source: str
    """A run (`quickstart`, `quickstart:teacher`), an artifact's address, or a directory."""
    draft: Draft | None = None
    engine: EngineSettings = EngineSettings()


class Replicas(StrictPart):
    """How many copies of the service there are, and what each holds."""

    min: int = Field(default=1, ge=0)
    """0 lets an idle service give everything back; the next request waits until it is up again."""
    max: int = Field(default=1, ge=1)
    target_ongoing: float = Field(default=16.0, gt=0)
    """Requests under way per replica that autoscaling aims at."""
    scale_up_after_s: float = Field(default=10.0, ge=0)
    """How long there must be more before a replica is added; the first one of none is added at once."""
    scale_down_after_s: float = Field(default=300.0, ge=0)
    """How long there must be less before a replica goes."""
    surge: bool = False
    """An update starts new replicas before it ends old ones. Without, replicas are replaced one by one in their place,
    and requests to a service of one wait meanwhile; with it, nobody waits, and twice the machines are needed."""
    cpus: float = Field(default=1.0, gt=0)
    """Without a GPU, an engine with two of its own parts its work between two processes, with less it is one."""
    gpus: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    drain_s: float = Field(default=60.0, ge=0)
    """How long a replica that is to stop may finish what it has begun."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError("min is more than max")
        return self


class ServeSettings(StrictPart):
    """A service."""

    models: tuple[ServedModel, ...] = Field(min_length=1)
    store: str | None = None
    access: Access = Access()
    limits: Limits = Limits()
    replicas: Replicas = Replicas()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name")
        return self

    @classmethod
    def parse(cls, data: Any, told: str) -> ServeSettings:
        """Plain data to settings. Raises `ServeError` that names the field."""
        try:
            return cls.model_validate(as_frozen(data))
        except ValidationError as error:
            raise ServeError(*describe_validation_error(error, cls, told)) from None

    @classmethod
    def load(cls, path: str | Path) -> ServeSettings:
        """Read YAML. Raises `ServeError`."""
        return cls.parse(read_yaml(Path(path), ServeError), str(path))
