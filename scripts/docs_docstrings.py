"""Docstrings as Markdown, for the reference pages of the documentation site.

The package's docstrings are plain text that is meant to be read in a terminal: a paragraph, or a
line `name: what it is` for each argument or field, whose further lines are indented. Here such
lines become a list, and what Markdown would take for HTML becomes text.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): ")
"""The start of a line that says what an argument is: `name: ` or `name, other: `."""


class MarkdownDocstrings(griffe.Extension):
    """Griffe's extension: every docstring that it has read is rewritten."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, _known_names(obj))


def _known_names(obj: griffe.Object) -> set[str]:
    names = set(obj.members) if isinstance(obj, griffe.Class) else set()
    if isinstance(obj, griffe.Function):
        names = {parameter.name for parameter in obj.parameters}
    return names


def as_markdown(text: str, known: set[str]) -> str:
    """The docstring, with lists where it says what arguments are.

    A line starts an entry if its first name is one of `known`, or if the next one is indented.
    """
    lines = text.splitlines()
    found: list[str] = []
    in_list = False
    for place, line in enumerate(lines):
        following = lines[place + 1] if place + 1 < len(lines) else ""
        match = ENTRY.match(line)
        starts = match is not None and (
            match[1].split(",")[0].strip("*") in known or following.startswith("    ")
        )
        if match is not None and starts:
            if not in_list:
                found.append("")
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            line = f"- {names}: {line[match.end() :]}"
        elif line and not line.startswith(" ") and in_list:
            found.append("")  # a line at the margin ends the list
        in_list = starts or (in_list and line.startswith("    "))
        found.append(line if _is_code(line, in_list) else without_tags(line))
    return "\n".join(found)


def _is_code(line: str, in_list: bool) -> bool:
    return line.startswith("    ") and not in_list


def without_tags(line: str) -> str:
    """The line with every `<` outside of code as text."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;") for part in parts
    )
