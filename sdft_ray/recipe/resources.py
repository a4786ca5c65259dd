"""Resources: how a recipe is executed. Never part of identity: the same artifacts are reused when they change.

The defaults fit a laptop with two CPU cores. Profiles for GPUs and clusters lie in `cluster/resources/`. What is
`auto` is chosen from the architecture and the machine before anything starts (`pipeline.memory`); where nobody plans,
such as a stage that is run by itself, the properties say what is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sdft_ray.errors import ResourceError
from sdft_ray.recipe.yaml_model import StrictPart, as_frozen, describe_validation_error, read_yaml

Auto = Literal["auto"]
_Count = Annotated[int, Field(ge=1)]


class Device(StrictPart):
    """Resources of one Ray task, actor or training worker."""

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    """A Ray accelerator type such as `H100`; None: any."""
    resources: dict[str, float] = Field(default={})
    """Custom Ray resources, for placing a stage on chosen nodes."""


class Measure(Device):
    num_tasks: int = Field(default=1, ge=1)
    """Ray tasks that measure parts of the calibration set in parallel; the result does not depend on it."""
    batch_tokens: int = Field(default=4096, ge=1)


class Server(StrictPart):
    """An OpenAI-compatible server that runs the teacher."""

    base_url: str
    """Including `/v1`."""
    model: str
    """Name of the teacher on the server."""
    api_key_env: str | None = None
    """Environment variable that contains the API key, on the nodes of the actors."""
    max_in_flight: int = Field(default=64, ge=1)
    timeout_s: float = Field(default=600.0, gt=0)


class Engine(Device):
    """A Ray actor with an inference engine."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and activations. `auto`: what is faster on the hardware and no less exact than the recipe's
    `teacher.dtype`. Of the others, those that are no less exact."""
    tensor_parallel: int = Field(default=1, ge=1)
    kv_cache_bytes: Annotated[int, Field(ge=2**20)] | Auto = "auto"
    """Size of the KV cache of each engine, in bytes; `auto`: at least one whole context, and more where memory is."""
    max_model_tokens: Annotated[int, Field(ge=8)] | Auto | None = "auto"
    """Context length of the engine. None: that of the model. `auto`: for generation what the longest prompt and its
    response need; for evaluation that of the model, or what memory holds of it."""
    max_sequences: int = Field(default=128, ge=1)
    """Maximum number of sequences in a batch of one engine."""
    enforce_eager: bool = True

    @property
    def kv_bytes(self) -> int:
        """`kv_cache_bytes`; 256 MiB where nobody planned."""
        return 256 * 2**20 if self.kv_cache_bytes == "auto" else self.kv_cache_bytes

    @property
    def context_tokens(self) -> int | None:
        """`max_model_tokens`; None (that of the model) where nobody planned."""
        return None if self.max_model_tokens == "auto" else self.max_model_tokens


class Generate(Engine):
    cpus: float = Field(default=0.8, gt=0)
    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=1, ge=1)
    sampler: Literal["vllm", "transformers", "server", "scripted"] = "vllm"
    """`server`: an OpenAI-compatible server that runs the teacher; `scripted`: a dry run without a model."""
    server: Server | None = None
    chunks_in_flight: int | None = Field(default=None, ge=1)
    """Chunks of 64 rows that one actor works on at a time; None: enough for twice `max_sequences`, plus one."""
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run stops when more than this share of the rows of the seed set fails."""
    min_kept: float = Field(default=0.25, ge=0, le=1)
    """The run stops when selection keeps less than this share of the rewrites, where something is trained on them.

    With the share k of the rows rewritten, training moves by about k times what rewriting all of them would, and to see
    a difference k times as large takes 1/k^2 times as many test items: 16 times as many at the default. Below that, an
    arm on the distilled set is fine-tuning on references under another name. 0 asks for one rewrite."""
    scripted_delay_s: float = Field(default=0.0, ge=0)
    """Time that the scripted sampler takes for a row."""

    @model_validator(mode="after")
    def _server_is_named(self) -> Self:
        if (self.sampler == "server") != (self.server is not None):
            raise ValueError("`sampler: server` and `server: {base_url, model}` must be given together")
        return self


class Gap(Device):
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens in a forward pass, padding included; logits are made for a few response tokens at a time."""


class Train(Device):
    num_workers: _Count | tuple[_Count, _Count] | Auto = "auto"
    """A number, or [MIN, MAX] for elastic training: as many workers as the cluster has room for. When that number
    changes, training resumes from the last checkpoint. `auto`: two, or one where CPUs or memory hold no more; on
    GPUs one for each."""
    resize_every_s: float = Field(default=60.0, ge=0)
    """How often elastic training checks whether more workers fit."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: each worker holds the whole model; `fsdp`: a shard of weights, gradients and optimizer state."""
    reshard_after_forward: bool = True
    """With `fsdp`: free the weights of a block after its forward pass, and gather them again for its backward pass."""
    reduce_once: bool = True
    """With `fsdp`: reduce gradients once per step; each worker then holds full gradients between micro-batches."""
    micro_batch_size: _Count | Auto = Field(default="auto", serialization_alias="micro_batch_rows")
    """Packed rows in one forward and backward pass of a worker; `auto`: at most 8, on a CPU of 2,048 tokens, as many as
    memory holds. The result depends on it by rounding alone."""
    precision: Literal["fp32", "bf16"] = "bf16"
    checkpoint_every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints. Ray Train accepts one every two seconds (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S;
    five a second on a local Ray): more would wait at the end of the run."""
    checkpoint_every_s: float = Field(default=300.0, gt=0)
    """Seconds after which a checkpoint is written even if `checkpoint_every` steps are not done, by the clock of the
    first worker, at the end of a step. Long steps and short runs have checkpoints through it."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. With 1, there is no older one to resume from if it is damaged."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: for long rows and large models."""
    max_failures: int = Field(default=3, ge=0)
    """How many failures of workers or nodes training survives; after each, it resumes from the last checkpoint."""
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Trackers that also get loss, gradient norm, tokens/s, MFU, memory and remaining time. Their files are under
    `tracking/` in the store: see `training/trackers.py`. `history.jsonl` is always written."""

    @property
    def workers(self) -> int | tuple[int, int]:
        """`num_workers`; 2 where nobody planned."""
        return 2 if self.num_workers == "auto" else self.num_workers

    @property
    def min_workers(self) -> int:
        """The fewest with which training can go on."""
        if self.num_workers == "auto":
            return 1
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def micro_batch_rows(self) -> int:
        """`micro_batch_size`; 8 where nobody planned."""
        return 8 if self.micro_batch_size == "auto" else self.micro_batch_size

    @model_validator(mode="after")
    def _workers_in_order(self) -> Self:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError("num_workers is [MIN, MAX], but the first number is larger than the second")
        return self


class Evaluate(Engine):
    cpus: float = Field(default=0.9, gt=0)
    num_actors: int = Field(default=1, ge=1)
    """Actors that share the items of one model; several models are evaluated in parallel if there is room."""
    sampler: Literal["vllm", "transformers"] = "vllm"


class Resources(StrictPart):
    """Workers, accelerators and micro-batches; `stages.spec` says which part a stage works with."""

    cpus: int | None = Field(default=None, ge=1)
    """CPUs of a local Ray; None: all. Ignored when connected to a cluster."""
    memory_bytes: int | None = Field(default=None, ge=2**30)
    """Main memory of this machine that a run may take; None: what is free when it starts. Ignored when connected to a
    cluster."""
    object_store_bytes: int = Field(default=512 * 2**20, ge=80 * 2**20)
    """Size of the object store of a local Ray."""
    max_shard_bytes: int = Field(default=5 * 2**30, ge=2**20)
    """Maximum size of a safetensors file that pruning writes."""
    store: str | None = None
    """Store URL if the command gives none."""
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
