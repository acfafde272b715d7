"""Reading a recipe: YAML, `--set` overrides, and error messages that name the file's own keys. Imports no torch.

`--set` overrides the file, and the file overrides the defaults. All mistakes of a file are reported together.
"""

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import ValidationError

from dag.errors import UsageError
from dag.recipe import ObjectiveTerm, Recipe, shipped, validate
from dag.recipe.reward_sections import RewardTerm
from dag.recipe.search_sections import SEARCHES, SHARED, SearchRecipe, SearchTerm
from dag.recipe.section import Section

_Schema = typing.TypeVar("_Schema", bound=Section)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path:      YAML file.
        overrides: `key.sub=value` strings; the value is YAML.

    Raises:
        UsageError: naming the file and every mistake in it.
    """
    data, overridden = read(path, overrides)
    return parse(data, str(path), overridden)


def load_search(path: str | Path, method: str | None = None, overrides: typing.Sequence[str] = ()) -> SearchRecipe:
    """Read, override and check the recipe of a search, or what a training recipe says of model, sampler, prompts and reward.

    Args:
        path:      YAML file.
        method:    takes the place of the file's section `search`; a training recipe has none.
        overrides: as for `load`.

    Raises:
        UsageError: naming the file and every mistake in it.
    """
    data, _ = read(path, ())
    if "search" not in data:
        data = {key: value for key, value in data.items() if key in SHARED}
        if method is None:
            raise UsageError(f"{path}: a training recipe; say how to search: --method {', '.join(SEARCHES)}")
    given = data.get("search")
    if method is not None and not (isinstance(given, dict) and given.get("name") == method):
        data["search"] = {"name": method}
    for override in overrides:
        _apply_override(data, override)
    return checked(SearchRecipe, data, str(path), [override.partition("=")[0].strip() for override in overrides])


def read(path: str | Path, overrides: typing.Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(the mapping in a YAML file, with overrides, the overridden keys). Raises UsageError.

    A `path` recipes/... that is not there is taken from the recipes that are installed with this code.
    """
    try:
        text = shipped.found(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe: {getattr(error, 'strerror', None) or error}") from None
    try:
        data = yaml.load(text, _Loader)
    except Exception as error:  # not only YAMLError: an impossible date, for one, raises a ValueError
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a YAML file{where}: {reason}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, found {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    return data, [override.partition("=")[0].strip() for override in overrides]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error; YAML would keep the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def parse(data: dict[str, Any], source: str, overridden: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in a mapping. Raises UsageError with every mistake found.

    Args:
        source:     names the mapping in error messages.
        overridden: keys that come from `--set`, which is named in the place of `source` for mistakes in them.
    """
    recipe = checked(Recipe, data, source, overridden)
    problems = validate(recipe)
    if problems:
        raise UsageError("\n".join(f"{source}: {problem}" for problem in problems))
    return recipe


def checked(schema: type[_Schema], data: dict[str, Any], source: str, overridden: typing.Sequence[str] = ()) -> _Schema:
    """The sections in a mapping, each key checked by itself. Arguments and errors as for `parse`."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [
            f"--set {key}: {mistake}" if _is_in(key, overridden) else f"{source}: {key}: {mistake}"
            for key, mistake in _explain(error, schema)
        ]
        raise UsageError("\n".join(lines)) from None


def _is_in(key: str, overridden: typing.Sequence[str]) -> bool:
    """Whether a key, or a section that it is in, is among the overridden ones."""
    # A single reward may be written without its index in the list.
    spellings = (f"{key}.", f"{key}.".replace("reward.0.", "reward.", 1))
    return any(spelling.startswith(f"{name}.") for name in overridden for spelling in spellings)


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one flat {"section.key": value}."""
    if not isinstance(data, dict):
        return {prefix: data}
    return {
        key: value for name, part in data.items() for key, value in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def parse_reward(name: str, overrides: typing.Sequence[str]) -> RewardTerm:
    """The section of a reward from its name and `key=value` options, checked as in a recipe. Raises UsageError."""
    data: dict[str, Any] = {"reward": {"name": name}}
    for override in overrides:
        _apply_override(data["reward"], override)
    # Any recipe around it: the reward is then checked by the schema that checks recipes.
    data |= {"model": {"path": "embedded"}, "prompts": {"texts": ["-"]}, "objective": {"name": "ddpo"}}
    return parse(data, "--set").reward[0]


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    override = _shown(override)
    if not separator or not key.strip():
        raise UsageError(f"--set {override}: write key.sub=value")
    try:
        value = yaml.load(raw, _Loader)
    except Exception:  # not only YAMLError, as in `load`
        raise UsageError(f"--set {override}: the value is not YAML") from None
    *parents, last = key.strip().split(".")
    node: Any = data
    for depth, name in enumerate(parents):
        node = _child(node, name, create=True)
        if not isinstance(node, dict | list):
            raise UsageError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a section")
    if isinstance(node, list):
        if not last.isdecimal() or int(last) >= len(node):
            raise UsageError(f"--set {override}: index {last!r} is not one of 0..{len(node) - 1}")
        node[int(last)] = value
    else:
        node[last] = value


def _shown(text: str) -> str:
    """The text as it may stand in one line of an error: escaped if it holds control characters or line breaks."""
    return text if text.isprintable() else repr(text)


def _child(node: Any, name: str, create: bool) -> Any:
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and int(name) < len(node) else None
    if create and node.get(name) is None:
        node[name] = {}
    return node.get(name)


def _explain(error: ValidationError, schema: type[Section]) -> list[tuple[str, str]]:
    """[(key, what is wrong with it)]"""
    mistakes = []
    for item in error.errors(include_url=False):
        location = _without_union_tag(item["loc"])
        key = _shown(".".join(map(str, location))) or "recipe"
        if item["type"] == "extra_forbidden":
            known = known_keys(item["loc"][:-1], schema)
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
            mistakes.append((key, f"unknown key{hint}"))
        elif item["type"] == "missing":
            mistakes.append((key, "missing, and it has no default"))
        elif item["type"] == "union_tag_invalid":
            context = item["ctx"]
            tags = context["expected_tags"].replace("'", "").split(", ")
            close = difflib.get_close_matches(str(context["tag"]), tags, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ";"
            mistakes.append((f"{key}.name", f"unknown name '{context['tag']}'{hint} known: {', '.join(tags)}"))
        elif item["type"] == "union_tag_not_found":
            mistakes.append((f"{key}.name", "missing, and it has no default"))
        elif location == ["reward"] and item["type"] == "tuple_type":
            mistakes.append((key, f"write {{name: ...}}, or a list of such sections (found {item['input']!r})"[:400]))
        else:
            message = _PLAIN.get(item["type"]) or item["msg"].removeprefix("Value error, ")
            found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
            mistakes.append((key, f"{message[0].lower()}{message[1:]}{found}"[:400]))
    return mistakes


_UNION_TAGS = {
    name
    for union in (RewardTerm, ObjectiveTerm, SearchTerm)
    for member in typing.get_args(typing.get_args(union)[0])
    for name in typing.get_args(member.model_fields["name"].annotation)
}


# Replacements for pydantic's messages that speak of Python rather than of YAML.
_SECTION = "input should be a section, key: value"
_PLAIN = {
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "tuple_type": "input should be a list",
    "string_pattern_mismatch": "write module:function or file.py:function",
}


def _without_union_tag(location: tuple[int | str, ...]) -> list[int | str]:
    """A mistake's location as keys of the file: without the `name` that pydantic adds for a reward, an objective or a search."""
    at = {"objective": 1, "search": 1, "reward": 2}.get(str(location[0])) if location else None
    return [part for index, part in enumerate(location) if index != at or part not in _UNION_TAGS]


def known_keys(path: typing.Sequence[int | str], schema: type[Section] = Recipe) -> list[str]:
    """The keys that the section at `path` accepts, sorted; [] is the top level.

    For a section with a `name` (reward, objective, search): those of that name if the path has it, else those of all names.
    """
    models: list[type[Section]] = [schema]
    for part in path:
        if isinstance(part, int):
            continue
        if part in _UNION_TAGS:
            models = [model for model in models if part in typing.get_args(model.model_fields["name"].annotation)]
            continue
        models = [
            m for model in models if part in model.model_fields for m in _sections(model.model_fields[part].annotation)
        ]
    return sorted({name for model in models for name in model.model_fields})


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return [section for argument in typing.get_args(annotation) for section in _sections(argument)]
    return []
