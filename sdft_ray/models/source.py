"""The source of a model: a local directory, or a Hub repository pinned to a commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import Checkpoint, read_config_file
from sdft_ray.models.companions import SKIPPED_ON_DOWNLOAD
from sdft_ray.models.json_file import read_json_object

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelSource:
    """A model that every node can fetch. Exactly one of `directory` and `hub` is set."""

    directory: str | None = None
    hub: str | None = None
    commit: str | None = None

    def fetch(self) -> Path:
        """A local directory with config, tokenizer and safetensors; downloads a Hub model once per node."""
        if self.directory is not None:
            return Path(self.directory)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

        assert self.hub is not None
        try:
            return Path(snapshot_download(self.hub, revision=self.commit, ignore_patterns=[*SKIPPED_ON_DOWNLOAD]))
        except (HTTPError, LocalEntryNotFoundError, OSError) as reason:
            raise ModelError(
                f"cannot download {self.hub} at {self.commit} from the Hugging Face Hub: {str(reason).splitlines()[0]}",
                "check the network and HF_TOKEN, or download the model and give its directory in the recipe",
            ) from None


def resolve_source(model: str, revision: str | None, field: str = "teacher.revision") -> ModelSource:
    """Convert the model of a recipe into a source; `field` is the recipe field of its revision, for error messages.

    Raises `ModelError` if it is neither a directory nor a Hub name.
    """
    path = Path(model)
    if path.is_dir():
        return ModelSource(directory=str(path.resolve()))
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ModelError(
            f"no model directory {model}", "give a directory, or a name on the Hugging Face Hub such as org/name"
        )
    return ModelSource(hub=model, commit=_commit_of(model, revision, field))


def _commit_of(model: str, revision: str | None, field: str) -> str:
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        commit = HfApi().model_info(model, revision=revision, timeout=10).sha
    except (HTTPError, OfflineModeIsEnabled, OSError) as reason:
        raise ModelError(
            f"{model} is not a directory, and the Hugging Face Hub did not return its commit: "
            f"{str(reason).splitlines()[0]}",
            f"check the name and HF_TOKEN, or pin {field} to a 40-digit commit",
        ) from None
    assert commit is not None
    return commit


def read_config(source: ModelSource, copy: str | None) -> dict[str, Any] | None:
    """config.json from the directory of the model, the Hub cache, or the copy given in the recipe; else None.

    Of a directory with a head stored apart, it is the config with an untied head (`Checkpoint`).
    """
    if source.directory is not None:
        config = read_config_file(Path(source.directory))
        try:
            return dict(Checkpoint.open(source.directory).config)
        except ModelError:  # what is wrong with the weights is said when they are needed
            return config
    from huggingface_hub import try_to_load_from_cache

    assert source.hub is not None
    cached = try_to_load_from_cache(source.hub, "config.json", revision=source.commit)
    if isinstance(cached, str):
        return read_json_object(Path(cached))
    return read_json_object(Path(copy)) if copy else None
