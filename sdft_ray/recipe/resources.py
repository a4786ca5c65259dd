"""Resources: how a recipe is executed. Never part of identity: change them and the same artifacts are found.

The defaults fit a laptop with two CPU cores. Profiles for GPUs and clusters lie in `cluster/resources/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sdft_ray.errors import ResourceError
from sdft_ray.recipe.yaml_model import StrictPart, as_frozen, describe_validation_error, read_yaml


class Device(StrictPart):
    """What one worker holds."""

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    """A Ray accelerator type such as `H100`; None takes any."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources, for placing a stage on chosen nodes."""


class Measure(Device):
    num_tasks: int = Field(default=1, ge=1)
    """Calibration shards measured in parallel; the answer does not depend on it."""
    batch_tokens: int = Field(default=4096, ge=1)


class Server(StrictPart):
    """An OpenAI-compatible server that runs the teacher."""

    base_url: str
    """With its `/v1`."""
    model: str
    """The teacher's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the key, on the machines of the actors."""
    max_in_flight: int = Field(default=64, ge=1)
    timeout_s: float = Field(default=600.0, gt=0)


class Engine(Device):
    """An actor that answers prompts."""

    tensor_parallel: int = Field(default=1, ge=1)
    kv_cache_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Key-value cache per engine, in bytes."""
    max_model_tokens: int | None = Field(default=None, ge=8)
    """Context of the engine; None takes the model's own."""
    max_sequences: int = Field(default=128, ge=1)
    """Sequences that one engine decodes together."""
    enforce_eager: bool = True


class Generate(Engine):
    cpus: float = Field(default=0.8, gt=0)
    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=1, ge=1)
    sampler: Literal["vllm", "transformers", "server", "scripted"] = "vllm"
    """`server` asks an OpenAI-compatible one that runs the teacher; `scripted` asks no model: a dry run."""
    server: Server | None = None
    chunks_in_flight: int | None = Field(default=None, ge=1)
    """Chunks of 64 rows that one actor works on at a time; None: twice what `max_sequences` holds, and one."""
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    """More failed rows than this share of the seed set stop the run."""
    scripted_delay_s: float = Field(default=0.0, ge=0)
    """How long the scripted sampler takes over a row."""

    @model_validator(mode="after")
    def _server_is_named(self) -> Self:
        if (self.sampler == "server") != (self.server is not None):
            raise ValueError("`sampler: server` and `server: {base_url, model}` go together")
        return self


class Gap(Device):
    batch_tokens: int = Field(default=2048, ge=1)
    """Positions scored at once, pads included; the logits of all their responses are held in the model's dtype."""


class Train(Device):
    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 2
    """Or (least, most): as many as the cluster has room for, going on from the last checkpoint when that changes."""
    resize_every_s: float = Field(default=60.0, ge=0)
    """How often a run of (least, most) workers looks for room to grow."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole model; `fsdp`: each holds a share of weights, gradients and optimizer."""
    reshard_after_forward: bool = True
    """With `fsdp`: free a block's weights between its forward and backward pass, and gather them twice."""
    reduce_once: bool = True
    """With `fsdp`: sum gradients once a step, for which each worker holds a whole gradient between micro-batches."""
    micro_batch_size: int = Field(default=8, ge=1, serialization_alias="micro_batch_rows")
    """Packed rows that a worker computes at once."""
    precision: Literal["fp32", "bf16"] = "bf16"
    checkpoint_every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints. Ray Train takes in one every two seconds (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S;
    five a second on a local Ray): more would wait at the end of the run."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest so many are kept; with one alone, nothing is left to go back to when it is damaged."""
    activation_checkpointing: bool = False
    """Compute activations twice and hold few of them: for long rows and large models."""
    max_failures: int = Field(default=3, ge=0)
    """Lost workers or nodes after which a run goes on from its last checkpoint."""
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Also show loss, gradient norm, tokens/s, MFU, memory and time left there, under `tracking/` in the store: see
    `training/trackers.py`. `history.jsonl` is always written."""

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @model_validator(mode="after")
    def _workers_in_order(self) -> Self:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError("num_workers is (least, most), in this order")
        return self


class Evaluate(Engine):
    cpus: float = Field(default=0.9, gt=0)
    num_actors: int = Field(default=1, ge=1)
    """Engines that share the questions to one model; several models are evaluated side by side as there is room."""
    sampler: Literal["vllm", "transformers"] = "vllm"


class Resources(StrictPart):
    """Workers, accelerators and micro-batches; `stages.spec` says which part a stage works with."""

    cpus: int | None = Field(default=None, ge=1)
    """CPUs that a Ray started here may use; None takes all. Ignored when joining a cluster."""
    object_store_bytes: int = Field(default=512 * 2**20, ge=80 * 2**20)
    """Ray's shared memory, when Ray is started here."""
    max_shard_bytes: int = Field(default=5 * 2**30, ge=2**20)
    """Largest safetensors file that pruning writes."""
    store: str | None = None
    """Store URL used when the command names none."""
    measure: Measure = Measure()
    generate: Generate = Generate()
    gap: Gap = Gap()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    prune: Device = Device(cpus=0.5)
    speed: Device = Device()

    @classmethod
    def load(cls, path: str | Path) -> Resources:
        """Read a YAML profile. Raises `ResourceError` that names the field."""
        data: Any = read_yaml(Path(path), ResourceError)
        try:
            return cls.model_validate(as_frozen(data))
        except ValidationError as error:
            raise ResourceError(*describe_validation_error(error, cls, str(path))) from None
