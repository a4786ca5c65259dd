"""The model card of an imported model."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sdft_ray.importing.source import Origin
from sdft_ray.report.toolbox.markdown import code, escaped, plain
from sdft_ray.store.fingerprint import file_digest

if TYPE_CHECKING:
    from sdft_ray.importing.importer import Imported

CARD, SOURCE_CARD = "README.md", "README.source.md"


def card(origin: Origin, result: Imported) -> str:
    """Markdown with front matter for the hub: where the weights came from, and what was lost on the way."""
    title = origin.name or origin.base_model or result.directory.name
    files = [(code(path.name), f"{path.stat().st_size:,}", code(file_digest(path))) for path in origin.files]
    rows = "\n".join(f"| {' | '.join(row)} |" for row in files)
    notes = [note[:1].upper() + note[1:] for note in result.notes] or ["Nothing is known to be"]
    lost = "\n".join(f"- {escaped(note)}." for note in notes)
    licence = origin.licence
    says = f"{code(licence.identifier)}, according to {escaped(licence.origin)}" if licence else "see its source"
    made = f"`sdft import` (`sdft_ray` {escaped(version('sdft_ray'))})"
    return f"""---
{_front_matter(origin)}
---

# {escaped(title)}

A {code(result.model_type)} model of {result.num_parameters:,} parameters in {result.dtype}, imported from
{escaped(origin.kind)} with {made}. Nothing was trained or pruned.

## What was lost or changed

{lost}

## Where it came from

| file | bytes | sha256 |
|---|--:|---|
{rows}

Licence: {says}.
"""


def _front_matter(origin: Origin) -> str:
    from huggingface_hub import ModelCardData

    licence = origin.licence
    fields: dict[str, Any] = {
        "base_model": origin.base_model or None,
        "library_name": "transformers",
        "license": plain(licence.identifier) if licence else None,
        "license_name": (licence.name or None) if licence else None,
        "license_link": (licence.link or None) if licence else None,
        "pipeline_tag": "text-generation",
    }
    return ModelCardData(**fields).to_yaml()
