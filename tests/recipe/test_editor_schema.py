"""recipes/recipe.schema.json is the sections' own schema, and every shipped recipe refers to it and keeps it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dag.recipe import editor_schema, shipped

RECIPES = sorted(shipped.folder().rglob("*.yaml"))
SCHEMA = json.loads((shipped.folder() / shipped.SCHEMA).read_text(encoding="utf-8"))
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


class _Numbers(yaml.SafeLoader):
    """Reads 3e-4 as a number, as editors do (YAML 1.2)."""


_Numbers.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+e[-+]?\d+$"), list("+-0123456789"))


def mistakes(node: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Keys, types, names and ranges of a mapping that the schema does not allow."""
    if "$ref" in schema:
        return mistakes(node, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    if "if" in schema:
        return mistakes(node, schema["then" if "search" in node else "else"], where)
    for choice in (schema[word] for word in ("anyOf", "oneOf") if word in schema):
        tried = [mistakes(node, option, where) for option in choice]
        return [] if [] in tried else min(tried, key=len)
    kind = schema.get("type")
    if kind and (not isinstance(node, _TYPES[kind]) or (isinstance(node, bool) and kind in ("integer", "number"))):
        return [f"{where}: {node!r} is no {kind}"]
    if node not in schema.get("enum", [node]) or node != schema.get("const", node):
        return [f"{where}: {node!r} is not allowed"]
    is_low = ("minimum" in schema and node < schema["minimum"]) or (
        "exclusiveMinimum" in schema and node <= schema["exclusiveMinimum"]
    )
    if is_low or ("maximum" in schema and node > schema["maximum"]):
        return [f"{where}: {node!r} is out of range"]
    if isinstance(node, list):
        return [line for item in node for line in mistakes(item, schema.get("items", {}), f"{where}[]")]
    if not isinstance(node, dict):
        return []
    known = schema.get("properties", {})
    found = [f"{where}.{key}: missing" for key in schema.get("required", []) if key not in node]
    for key, value in node.items():
        found += mistakes(value, known[key], f"{where}.{key}") if key in known else [f"{where}.{key}: unknown"]
    return found


def test_the_shipped_schema_is_that_of_the_sections() -> None:
    """If this fails: python -m dag.recipe.editor_schema > recipes/recipe.schema.json"""
    assert editor_schema.editor_schema() == SCHEMA
    assert (shipped.folder() / shipped.SCHEMA).read_text(encoding="utf-8") == editor_schema.text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(shipped.folder())))
def test_a_shipped_recipe_refers_to_the_schema_and_keeps_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    reference = Path(os.path.relpath(shipped.folder() / shipped.SCHEMA, path.parent)).as_posix()
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={reference}"
    assert mistakes(yaml.load(text, _Numbers), SCHEMA) == []


def test_the_schema_says_what_sections_say() -> None:
    train = SCHEMA["$defs"]["Train"]["properties"]
    assert train["epochs"]["minimum"] == 1 and train["epochs"]["default"] == 100
    assert train["epochs"]["description"].startswith("Number of epochs; an epoch is one rollout")
    assert train["rollout"]["enum"] == ["stored", "one_pass"]
    key = {"type": "string", "title": "Title"}
    is_like_a_word = {"title": "A", "properties": {"title": key, "properties": key}}
    assert editor_schema._tidy(is_like_a_word) == {
        "properties": {name: {"type": "string"} for name in ("title", "properties")}
    }


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"trian": {}}, ".trian: unknown"),
        ({"train": {"epochs": 0}}, ".train.epochs: 0 is out of range"),
        ({"train": {"rollout": "two_pass"}}, ".train.rollout: 'two_pass' is not allowed"),
        ({"sampler": {"tile": "8"}}, ".sampler.tile: '8' is no integer"),
        ({"prompts": None}, ".prompts: None is no object"),
    ],
)
def test_the_schema_finds_mistakes(change: dict[str, Any], mistake: str) -> None:
    right = {
        "model": {"path": "embedded"},
        "prompts": {"texts": ["a cat"]},
        "reward": {"name": "colourfulness"},
        "objective": {"name": "ddpo"},
    }
    assert mistakes(right, SCHEMA) == []
    assert mistakes(right | change, SCHEMA) == [mistake]
