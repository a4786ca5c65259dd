"""Builds the samplers that the resources configure, in the calling process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sdft_ray.models.precision import EngineUse, precision_of
from sdft_ray.recipe.resources import Engine
from sdft_ray.stages.job import StageContext

if TYPE_CHECKING:
    from sdft_ray.data.messages import ChatSettings
    from sdft_ray.generation.sampler import LocalSampler, Sampler


def prepare_process() -> None:
    """To be called before vLLM is first imported.

    One process holds engine and actor: half the start-up of vLLM's default, at the same speed.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def teacher_sampler(job: StageContext) -> Sampler:
    """The sampler of stage `generate`, over the teacher."""
    settings = job.resources.generate
    if settings.sampler == "scripted":
        from sdft_ray.generation.sampler import ScriptedSampler

        return ScriptedSampler(delay_s=settings.scripted_delay_s)
    if settings.server is not None:
        from sdft_ray.generation.server_sampler import ServerSampler

        server = settings.server
        key = os.environ[server.api_key_env] if server.api_key_env else "none"
        return ServerSampler(
            server.base_url,
            server.model,
            api_key=key,
            max_in_flight=server.max_in_flight,
            timeout_s=server.timeout_s,
            escape=job.teacher.chat.break_control_tokens,
        )
    chat = job.teacher.chat_settings
    return local_sampler(job.model("teacher"), settings.sampler, settings, job.teacher.dtype, chat)


def local_sampler(
    model_dir: Path, kind: str, settings: Engine, dtype: str, chat: ChatSettings | None = None
) -> LocalSampler:
    """`kind` is `vllm` or `transformers`; `dtype` is the recipe's, which the engine may exceed (`models.precision`)."""
    precision = precision_of(settings.dtype, model_dir, wanted=dtype, kv_cache_bytes=settings.kv_bytes)
    sampler = _open(model_dir, kind, settings, precision.dtype, chat)
    sampler.engine = EngineUse(kind, precision).to_json()
    return sampler


def _open(model_dir: Path, kind: str, settings: Engine, dtype: str, chat: ChatSettings | None) -> LocalSampler:
    if kind == "transformers":
        from sdft_ray.generation.transformers_sampler import TransformersSampler

        return TransformersSampler(
            model_dir,
            dtype=dtype,
            device="cuda" if settings.gpus else "cpu",
            max_model_tokens=settings.context_tokens,
            max_sequences=settings.max_sequences,
            chat=chat,
        )
    from sdft_ray.generation.vllm_sampler import VllmSampler

    return VllmSampler(
        model_dir,
        dtype=dtype,
        kv_cache_bytes=settings.kv_bytes,
        max_model_tokens=settings.context_tokens,
        max_sequences=settings.max_sequences,
        enforce_eager=settings.enforce_eager,
        tensor_parallel=settings.tensor_parallel,
        chat=chat,
    )
