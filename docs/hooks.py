"""Pages that the package's own schema and parser write while the site is built: they cannot fall behind the code."""

from __future__ import annotations

import argparse
from typing import Any

from digrap_scale.cli import _parser
from digrap_scale.config.reference import reference_markdown

GENERATED = {"config.md": "<!-- config reference -->", "command_line.md": "<!-- command line -->"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """mkdocs calls it for every page, before its Markdown is read."""
    marker = GENERATED.get(page.file.src_uri)
    if marker is None:
        return markdown
    if markdown.count(marker) != 1:
        raise ValueError(f"docs/{page.file.src_uri}: expected one line {marker!r}, found {markdown.count(marker)}")
    # The README has sections one level further down.
    text = reference_markdown().replace("\n###", "\n##").removeprefix("#")
    return markdown.replace(marker, text if page.file.src_uri == "config.md" else verbs_markdown())


def verbs_markdown() -> str:
    """Every verb of the command line with its arguments."""
    (choices,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = []
    for name, parser in choices.choices.items():
        lines = [
            f"## `digrap-scale {name}`",
            "",
            f"{parser.description}.",
            "",
            "| argument | what it is |",
            "|---|---|",
        ]
        for action in parser._actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            lines.append(f"| {_usage(action)} | {_help(action)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _usage(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest
    if not action.option_strings:
        return f"`{metavar}{' …' if action.nargs in ('*', '+') else ''}`"
    takes = "" if action.nargs == 0 else f" {metavar.upper()}{' …' if action.nargs in ('*', '+') else ''}"
    if action.choices is not None:
        takes = " {" + ",".join(str(choice) for choice in action.choices) + "}"
    return f"`{', '.join(action.option_strings)}{takes}`"


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default}
    return text.replace("|", "\\|") + (" (required)" if action.option_strings and action.required else "")
