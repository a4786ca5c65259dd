"""sdft_ray: make large language models smaller without losing what they can do.

    from sdft_ray import Recipe, Resources, compress

    result = compress(Recipe.load("quickstart.yaml"), store=".sdft", resources=Resources())

Importing this package loads neither torch, ray nor vllm; each name is fetched on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_ray.errors import SdftError, StageError, UserError
    from sdft_ray.pipeline.compress import compress
    from sdft_ray.recipe.recipe import Recipe
    from sdft_ray.recipe.resources import Resources

__all__ = ["Recipe", "Resources", "SdftError", "StageError", "UserError", "compress"]
__version__ = "0.1.0"

_HOME = {
    "Recipe": "recipe.recipe",
    "Resources": "recipe.resources",
    "SdftError": "errors",
    "StageError": "errors",
    "UserError": "errors",
    "compress": "pipeline.compress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
