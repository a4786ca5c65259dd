"""Prompt templates of lm-eval tasks, compiled once per task.

lm-eval compiles a Jinja template each time it is rendered: several times for every item, and again for every few-shot
example. It also accepts functions in place of templates (`doc_to_text`, `doc_to_target`, `doc_to_choice`), and that is
what `compile_templates` puts there. The functions return exactly what lm-eval makes of the template
(`lm_eval.api.task.ConfigurableTask`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from lm_eval import utils
from lm_eval.api.task import ConfigurableTask, Task

_Document = Mapping[str, Any]


def compile_templates(task: Task) -> None:
    """Replace the templates in the configuration of `task`, and in that of its few-shot examples, by functions.

    Names of dataset columns, lists and functions stay as they are, and so do tasks that are not configured by YAML or
    that use a Promptsource prompt.
    """
    if not isinstance(task, ConfigurableTask) or task.prompt is not None:
        return
    has_choices = task.config.doc_to_choice is not None
    for field, parse in (("doc_to_text", _text), ("doc_to_target", _target), ("doc_to_choice", _choices)):
        for config in (task.config, task.fewshot_cfg):
            template = getattr(config, field)
            if isinstance(template, str) and template not in task.features:
                setattr(config, field, _renderer(template, parse, has_choices))


def _renderer(template: str, parse: Callable[[str, bool], Any], has_choices: bool) -> Callable[[_Document], Any]:
    compiled = utils.env.from_string(template)
    return lambda document: parse(compiled.render(**document), has_choices)


def _text(rendered: str, has_choices: bool) -> Any:
    """A prompt, or the index of an option."""
    return ast.literal_eval(rendered) if rendered.isdigit() and has_choices else rendered


def _target(rendered: str, has_choices: bool) -> Any:
    """A reference answer, several of them, or the index of an option."""
    if rendered.isdigit() and has_choices:
        return ast.literal_eval(rendered)
    if len(rendered) >= 2 and rendered[0] == "[" and rendered[-1] == "]":
        try:
            return ast.literal_eval(rendered)
        except (SyntaxError, ValueError):
            return rendered
    return rendered


def _choices(rendered: str, has_choices: bool) -> Any:
    """The options."""
    return ast.literal_eval(rendered)
