"""What Ray Serve is asked for: replicas, how they scale, and how an update replaces them. Nothing is started here."""

from __future__ import annotations

from typing import Any

import pytest

from sdft_ray.errors import ServeError
from sdft_ray.serving.settings import ServeSettings

pytestmark = pytest.mark.slow  # to import Ray Serve takes seconds

MODELS = [{"name": "teacher", "source": "teacher"}]


def deployment_of(**replicas: Any) -> Any:
    """Ray Serve's deployment for a service with these `replicas`."""
    from sdft_ray.serving.deploy import application

    bound: Any = application(ServeSettings.parse({"models": MODELS, "replicas": replicas}, "the test"))
    return bound._bound_deployment


def test_a_service_may_scale_from_none_and_back() -> None:
    config = deployment_of(min=0, max=3, target_ongoing=5, scale_up_after_s=0, scale_down_after_s=3)._deployment_config
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 3, 5)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0, 3)


def test_a_fixed_number_of_replicas_does_not_scale() -> None:
    config = deployment_of(min=2, max=2, cpus=0.5)._deployment_config
    assert (config.num_replicas, config.autoscaling_config) == (2, None)


@pytest.mark.parametrize(("surge", "percent"), [(True, 100), (False, 0)])
def test_an_update_starts_new_replicas_before_it_ends_old_ones_where_that_is_asked(surge: bool, percent: int) -> None:
    config = deployment_of(surge=surge, drain_s=7)._deployment_config
    assert config.max_surge_percent == percent
    assert config.graceful_shutdown_timeout_s == 7


def test_replicas_ask_ray_for_what_they_hold() -> None:
    options = deployment_of(cpus=0.5, gpus=1, accelerator_type="H100").ray_actor_options
    assert (options["num_cpus"], options["num_gpus"], options["accelerator_type"]) == (0.5, 1, "H100")


def test_a_data_type_for_all_models() -> None:
    models = [*MODELS, {"name": "b", "source": "b", "engine": {"kind": "transformers", "dtype": "bfloat16"}}]
    settings = ServeSettings.parse({"models": models}, "the test").with_dtype("float32")
    assert [(model.engine.kind, model.engine.dtype) for model in settings.models] == [
        ("vllm", "float32"),
        ("transformers", "float32"),
    ]


def test_a_config_file_that_would_let_in_everyone_is_refused() -> None:
    from sdft_ray.serving.deploy import build

    with pytest.raises(ServeError, match="key"):
        build({"models": MODELS})
