"""Changes single keys in the text of a recipe, so that its comments stay. Imports no torch.

It knows the two forms in which the shipped recipes write a section: `name: {key: value, ...}` in one line, and a block of
indented lines. The caller parses the result and compares it with what it wanted.
"""

import re
from typing import Any

import yaml


def flow(value: Any) -> str:
    """A value as YAML in one line, as it stands behind a key."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20)
    return text.removesuffix("...\n").strip()


def without_header(text: str) -> tuple[list[str], str]:
    """(the comment lines at the beginning of a recipe, the rest of it)."""
    lines = text.splitlines(keepends=True)
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.rstrip("\n") for line in lines[:end]], "".join(lines[end:])


def with_section(text: str, name: str, value: Any) -> str:
    """The recipe with another section, written in one line."""
    lines, line = text.splitlines(keepends=True), f"{name}: {flow(value)}\n"
    first, end = _block(lines, name)
    return "".join([*lines[:first], line, *lines[end:]])


def with_value(text: str, section: str, key: str, value: Any) -> str:
    """The recipe with another value of a key, whose old value is a single word if it is there."""
    lines = text.splitlines(keepends=True)
    first, end = _block(lines, section)
    block, written = "".join(lines[first:end]), f"{key}: {flow(value)}"
    changed, count = re.subn(rf"(?<![\w.]){key}: [^\s,}}]+", lambda _: written, block, count=1)
    if not block:
        changed = f"{section}: {{{written}}}\n"
    elif not count and "{" in block.split(":", 1)[1].split("\n", 1)[0].partition("#")[0]:
        head, _, tail = block.rpartition("}")
        changed = f"{head}, {written}}}{tail}"
    elif not count:
        changed = f"{block}  {written}\n"
    return "".join([*lines[:first], changed, *lines[end:]])


def _block(lines: list[str], name: str) -> tuple[int, int]:
    """(first line of a section, the line after its last); both are the end of the text if it is not there."""
    first = next((number for number, line in enumerate(lines) if line.startswith(f"{name}:")), len(lines))
    rest = range(first + 1, len(lines))
    return first, next((number for number in rest if not lines[number].startswith(" ")), len(lines))
