"""Randomly damaged recipes: each loads or is refused with a message, none crashes."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from dag.errors import UsageError
from dag.recipe.load import load

RECIPES = Path(__file__).parents[2] / "recipes"
ORIGINALS = (RECIPES / "compressibility_24gb.yaml", RECIPES / "tiny_cpu.yaml")

JUNK: list[Any] = [
    None, True, -1, 0, 1, 3.5, 1e300, "", "x", "1e-4", "embedded", "none", [], [1], ["a"], [[]], {}, {"name": "dag_kl"},
    {"name": []}, {"value": "x"}, {3: 4}, 2**70, "\u00e9\U0001f600", "a" * 500,
]  # fmt: skip


def containers(node: Any) -> list[Any]:
    """Every non-empty dict and list in a tree of YAML."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    inner = [found for child in children for found in containers(child)]
    return [node, *inner] if isinstance(node, dict | list) and node else inner


def mutate(data: dict[str, Any], rng: random.Random) -> None:
    node = rng.choice(containers(data))
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    action = rng.choice(["replace", "replace", "delete", "misspell", "wrap", "swap"])
    if action == "delete":
        del node[key]
    elif action == "misspell" and isinstance(node, dict):
        node[str(key)[:-1] + rng.choice("aeiou")] = node.pop(key)
    elif action == "wrap":
        node[key] = [node[key]]
    elif action == "swap":
        node[key] = copy.deepcopy(rng.choice(containers(data)))
    else:
        node[key] = rng.choice(JUNK)


def garble(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    return (
        text[:at]
        + rng.choice(["", "\t", ":", "{", "]", "- ", "\n", "&a ", "*a", "'", "#", "!", "%", "0"])
        + text[at + 1 :]
    )


def random_override(data: dict[str, Any], rng: random.Random) -> str:
    keys: list[str] = []
    node: Any = data
    while isinstance(node, dict | list) and node and (not keys or rng.random() < 0.8):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        keys.append(str(key))
        node = node[key]
    path = ".".join([*keys, *rng.choice([[], [], [], ["x"], ["0"], ["-1"], [""]])])
    same = json.dumps(node)
    return f"{path}={rng.choice([same, same, '', '1', 'x', '1e-4', '[', '[a]', '{a: 1}', 'null', ': :'])}"


def damaged(text: str, kind: str, rng: random.Random) -> tuple[str, list[str]]:
    """A strategy for (a recipe's text, overrides) with random mistakes in the tree, the characters or the overrides."""
    if kind == "text":
        return garble(text, rng), []
    data = yaml.safe_load(text)
    if kind == "override":
        return text, [random_override(data, rng) for _ in range(rng.randint(1, 2))]
    for _ in range(rng.randint(1, 3)):
        if containers(data):
            mutate(data, rng)
    return yaml.safe_dump(data, allow_unicode=True), []


@pytest.mark.parametrize("kind", ["tree", "text", "override"])
def test_a_damaged_recipe_loads_or_is_refused_but_never_crashes(tmp_path: Path, kind: str) -> None:
    rng = random.Random(20240513)
    path = tmp_path / "damaged.yaml"
    messages: list[str] = []
    for number in range(100):
        text, overrides = damaged(ORIGINALS[number % len(ORIGINALS)].read_text(encoding="utf-8"), kind, rng)
        path.write_text(text, encoding="utf-8")
        try:
            load(path, overrides)
        except UsageError as error:
            messages.append(str(error))
    assert all(message.startswith((f"{path}: ", "--set ")) for message in messages)
    assert 0 < len(messages) < 100, "the damage is always fatal or never: the test says nothing"
