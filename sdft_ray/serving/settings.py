"""Settings of a service: models, engines, authentication, limits, replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from sdft_ray.engines.settings import EngineSettings
from sdft_ray.errors import ServeError
from sdft_ray.recipe.yaml_model import StrictPart, as_frozen, describe_validation_error, read_yaml


class Limits(StrictPart):
    """Limits of one request, and of concurrent requests."""

    max_body_bytes: int = Field(default=2 * 2**20, ge=1024)
    body_timeout_s: float = Field(default=20.0, gt=0)
    """Time in which the body must arrive; after it the status is 408."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Time in the queue and of generation together; after it the status is 504."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_output_tokens: int = Field(default=4096, ge=1)
    max_running: int = Field(default=128, ge=1)
    """Answers that a replica generates at a time, per model. More than the engine's batch size keeps it busy."""
    max_queued: int = Field(default=512, ge=0)
    """Answers that may wait in the queue; after that the status is 429."""


class Access(StrictPart):
    """Authentication. With neither keys nor `allow_anonymous`, the service starts on loopback only."""

    keys_file: str | None = None
    """YAML file of hashed keys; created and changed by `sdft keys`."""
    keys_variable: str = "SDFT_API_KEYS"
    """Environment variable of the replicas that may contain comma-separated ID:SHA256 pairs."""
    allow_anonymous: bool = False
    local_hosts_only: bool = False
    """Reject requests whose `Host` is not localhost: protects a service without keys against DNS rebinding."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may send requests from a browser (CORS); none by default."""


class Draft(StrictPart):
    """Speculative decoding: a smaller model proposes tokens, which the model verifies in one step.

    The distribution of answers does not change.
    """

    source: str
    num_tokens: int = Field(default=4, ge=1, le=16)


class ServedModel(StrictPart):
    """One model, under the name that clients use for it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+/-]{0,127}$")
    source: str
    """A run (`quickstart`, `quickstart:teacher`), the address of an artifact, or a directory."""
    draft: Draft | None = None
    engine: EngineSettings = EngineSettings()


class Replicas(StrictPart):
    """Number and resources of the replicas of the service."""

    min: int = Field(default=1, ge=0)
    """0 lets an idle service scale to zero; the next request then waits until a replica has started."""
    max: int = Field(default=1, ge=1)
    target_ongoing: float = Field(default=16.0, gt=0)
    """Concurrent requests per replica that autoscaling aims at (Ray Serve's `target_ongoing_requests`)."""
    scale_up_after_s: float = Field(default=10.0, ge=0)
    """Time above `target_ongoing` before a replica is added. From zero replicas, the first is added at once."""
    scale_down_after_s: float = Field(default=300.0, ge=0)
    """Time below `target_ongoing` before a replica is removed."""
    surge: bool = False
    """Start new replicas before old ones are stopped in an update. No request waits, but the update needs twice the
    resources. Without it, replicas are replaced one by one, and requests to a service with one replica wait."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs of a replica. Without a GPU, an engine with 2 or more CPUs uses two processes, otherwise one."""
    gpus: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    drain_s: float = Field(default=60.0, ge=0)
    """Time that a stopping replica has to finish its requests."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError("min is larger than max")
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

    def with_dtype(self, dtype: str) -> ServeSettings:
        """The same, with this `engine.dtype` for all models."""
        engines = [{**model.engine.model_dump(), "dtype": dtype} for model in self.models]
        models = [
            model.model_copy(update={"engine": EngineSettings.model_validate(engine)})
            for model, engine in zip(self.models, engines, strict=True)
        ]
        return self.model_copy(update={"models": tuple(models)})

    @classmethod
    def parse(cls, data: Any, origin: str) -> ServeSettings:
        """Settings from plain data. Raises `ServeError` that names `origin` and the field."""
        try:
            return cls.model_validate(as_frozen(data))
        except ValidationError as error:
            raise ServeError(*describe_validation_error(error, cls, origin)) from None

    @classmethod
    def load(cls, path: str | Path) -> ServeSettings:
        """Read a YAML file. Raises `ServeError`."""
        return cls.parse(read_yaml(Path(path), ServeError), str(path))
