"""What `serve deploy serve/config.yaml` builds: the service of `sdft serve`, from the `args` in that file."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from sdft_ray.serving.deploy import application
from sdft_ray.serving.local import check_closed
from sdft_ray.serving.settings import ServeSettings


def build(args: dict[str, Any]) -> Application:
    """Raises `ServeError` for settings that cannot be meant, or that let in everyone without saying so."""
    settings = ServeSettings.parse(args, "args in the Serve config")
    check_closed(settings.access)
    return application(settings)
