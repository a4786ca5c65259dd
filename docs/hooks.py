"""What the site needs beside its Markdown: the log of results, the command reference, and links into the repository.

mkdocs loads this file (`hooks` in mkdocs.yml). A page may link to any file of the repository, so that it also reads
well where only Markdown is rendered. On the site, a link to a file that is not part of it becomes plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"results/log.md": "jobs/recipes/LOG.md"}
"""Page of the site -> the file of the repository that it shows."""
COMMANDS = "<!-- commands -->"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add pages whose source lies outside of docs/."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for page, source in GENERATED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links, and fill in the command reference."""
    name = page.file.src_uri
    text = site_links(markdown, name)
    return text.replace(COMMANDS, command_reference()) if COMMANDS in text else text


def site_links(markdown: str, page: str) -> str:
    """The text of a page with the links that its place on the site needs."""
    source = GENERATED.get(page, f"docs/{page}")
    pages = {origin: name for name, origin in GENERATED.items()}

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        on_site = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not on_site:
            return text
        relative = os.path.relpath(on_site, posixpath.dirname(page) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def command_reference() -> str:
    """Every command of `sdft` with its arguments and options, as Markdown."""
    sys.path.insert(0, str(ROOT))
    from typer.main import get_command

    from sdft_ray.cli.app import app

    return "\n".join(_described("sdft", get_command(app)))


def _described(name: str, command: Any) -> list[str]:
    lines: list[str] = []
    if not hasattr(command, "commands"):
        lines += [f"## `{name}`", "", (command.help or "").strip(), "", f"```sh\n{_usage(name, command)}\n```", ""]
        lines += _parameters(command)
    for child, part in sorted(getattr(command, "commands", {}).items()):
        lines += _described(f"{name} {child}", part)
    return lines


def _usage(name: str, command: Any) -> str:
    arguments = [_metavar(part) for part in command.params if part.param_type_name == "argument"]
    return " ".join([name, *arguments, "[OPTIONS]"])


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _parameters(command: Any) -> list[str]:
    shown = [part for part in command.params if part.name != "help"]
    if not shown:
        return []
    rows = ["| | | default |", "|---|---|---|"]
    for part in shown:
        if part.param_type_name == "argument":
            label, default = f"`{_metavar(part)}`", "" if part.required else "optional"
        else:
            names = ", ".join(f"`{option}`" for option in (*part.opts, *part.secondary_opts))
            value = "" if part.is_flag else f" `{part.metavar or part.name.upper()}`"
            label, default = names + value, "required" if part.required else _default(part)
        text = " ".join((part.help or "").split()).replace("|", "\\|")
        rows.append(f"| {label} | {text} | {default} |")
    return [*rows, ""]


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or value is False or callable(value) or value == () else f"`{value}`"
