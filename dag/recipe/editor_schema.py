"""The JSON Schema of recipes, from which editors complete and check keys: recipes/recipe.schema.json. Imports no torch.

    python -m dag.recipe.editor_schema > recipes/recipe.schema.json

It is made from the sections: names, types, ranges, defaults and what their docstrings say. What involves several keys is
checked by `dag.recipe.load` alone. A recipe with a section `search` is one of a search.
"""

import json
import sys
from typing import Any

from pydantic.json_schema import models_json_schema

from dag.recipe import Recipe
from dag.recipe.search_sections import SearchRecipe

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def editor_schema() -> dict[str, Any]:
    """The schema as a mapping."""
    _, made = models_json_schema([(Recipe, "validation"), (SearchRecipe, "validation")])
    sections = {name: _tidy(section) for name, section in made["$defs"].items()}
    for name in (Recipe.__name__, SearchRecipe.__name__):
        # A single reward may be written without a list.
        rewards = sections[name]["properties"]["reward"]
        sections[name]["properties"]["reward"] = {"anyOf": [rewards["items"], rewards]}
    return {
        "$schema": _DIALECT,
        "title": "Recipe",
        "if": {"type": "object", "required": ["search"]},
        "then": {"$ref": f"#/$defs/{SearchRecipe.__name__}"},
        "else": {"$ref": f"#/$defs/{Recipe.__name__}"},
        "$defs": sections,
    }


def _tidy(node: Any, is_names: bool = False) -> Any:
    """Without the titles that repeat a key's name, OpenAPI's discriminators, and the line breaks of docstrings."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    left_out = () if is_names else ("title", "discriminator")
    tidied = {
        key: _tidy(value, key == "properties" and not is_names) for key, value in node.items() if key not in left_out
    }
    if not is_names and isinstance(tidied.get("description"), str):
        tidied["description"] = " ".join(tidied["description"].split())
    return tidied


def text() -> str:
    """The schema as it is shipped."""
    return json.dumps(editor_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
