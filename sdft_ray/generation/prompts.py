"""The rewriting prompt: one user turn with an instruction and its reference response.

The teacher answers the instruction in its own words (arXiv:2402.13669, figure 2; arXiv:2410.09982, section
3). A template is plain text with the two fields `{instruction}` and `{reference}`. Fields are replaced as
tokens in one pass, not by `str.format`, so braces in a template or in data stay as they are.
"""

from __future__ import annotations

import difflib
import re

from sdft_ray.errors import RecipeError

OWN_WORDS = "{instruction}\n\nReference: {reference}\n\nAnswer in your own words."
"""The default. The laboratory's teacher is trained on exactly this text."""

OWN_WORDS_DETAILED = """\
{instruction}

---
For orientation, here is a good response to the request above, written by somebody else:

{reference}
---

Now respond to the request yourself, the way you would have phrased it from the start. Use your own words, \
your own order and your own style. Show the steps that you would normally show. Arrive at the same final \
answer, and write that answer in the same form as above, so that the two can be compared. Address only the \
person who made the request: do not mention that you were shown a response, do not comment on it, and do not \
announce a rewrite. Begin with your response."""
"""For general instruction-tuned models, which need explicit instructions on what to leave out."""

TEMPLATES: dict[str, str] = {"own_words": OWN_WORDS, "own_words_detailed": OWN_WORDS_DETAILED}
"""Shipped templates by name."""

_FIELD = re.compile(r"\{(instruction|reference)\}")


def resolve_template(template: str) -> str:
    """The text of the shipped template with this name, or `template` itself if it is a template text.

    Raises `RecipeError` if it is neither: a template text contains both fields.
    """
    text = TEMPLATES.get(template, template)
    missing = sorted({"instruction", "reference"} - set(_FIELD.findall(text)))
    if not missing:
        return text
    if len(template) < 60 and "{" not in template and "\n" not in template:
        near = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"shipped templates: {', '.join(TEMPLATES)}"
        raise RecipeError(f"unknown rewriting template {template!r}", hint)
    fields = " and ".join(f"{{{name}}}" for name in missing)
    raise RecipeError(
        f"the rewriting template lacks {fields}",
        "add these fields: a template needs both the instruction and the reference",
    )


def render_rewrite(template: str, instruction: str, reference: str) -> str:
    """The user turn for one seed row. `template` is a name or a text; raises as `resolve_template`.

    Fields inside `instruction` or `reference` are data and are not replaced.
    """
    values = {"instruction": instruction, "reference": reference}
    return _FIELD.sub(lambda match: values[match[1]], resolve_template(template))
