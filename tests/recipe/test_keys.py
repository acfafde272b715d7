"""The shipped recipes load, their names are the registered ones, and every key of the schema is read by the code."""

import itertools
import typing
from pathlib import Path
from typing import Any

import pytest
from helpers.key_reader import FIELDS, fields_read, properties_of

from dag import recipe as schema
from dag.objectives import OBJECTIVES
from dag.recipe import reward_sections, search_sections
from dag.recipe.load import load, load_search
from dag.recipe.prompt_sets import DOWNLOADED, HPDV2_STYLES, SHIPPED
from dag.rewards import REWARDS
from dag.steering.runner import METHODS
from dag.training.plan import make_plan

ROOT = Path(__file__).parents[2]
SEARCHES = sorted((ROOT / "recipes/search").glob("*.yaml"))
RECIPES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {*SEARCHES})

# -- the recipes of this repository -------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_loads_and_can_be_planned(path: Path) -> None:
    plan = make_plan(load(path))
    assert plan.trajectories > 0
    assert plan.updates > 0
    assert plan.unet_rows_per_epoch > 0


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_search_loads(path: Path) -> None:
    assert load_search(path).as_training().reward == load_search(path).reward


@pytest.mark.parametrize("path", [*RECIPES, *SEARCHES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_says_what_it_is_for(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert any(line.startswith("# Purpose: ") for line in comment)
    assert any(f"--recipe {path.relative_to(ROOT)}" in line for line in comment), "the command must name this very file"


@pytest.mark.parametrize("small", sorted((ROOT / "recipes").glob("*_24gb.yaml")), ids=lambda path: path.stem)
def test_the_gpu_changes_how_an_update_is_computed_and_nothing_else(small: Path) -> None:
    others = [small.with_name(small.name.replace("_24gb", f"_{gib}gb")) for gib in (12, 48)]
    for other in filter(Path.exists, others):
        theirs, ours = load(other), load(small)
        same_memory = {
            "memory": ours.memory,
            "train": theirs.train.model_copy(update={"micro_batch": ours.train.micro_batch}),
            "sampler": theirs.sampler.model_copy(update={"tile": ours.sampler.tile}),
        }
        assert theirs.model_copy(update=same_memory) == ours, other.name


# -- names --------------------------------------------------------------------------------------------------------


def literals(annotation: Any) -> set[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    return {name for argument in typing.get_args(annotation) for name in literals(argument)}


def names_of(union: Any) -> set[str]:
    members = typing.get_args(typing.get_args(union)[0])
    return {name for member in members for name in literals(member.model_fields["name"].annotation)}


def test_names_in_recipes_are_the_registered_ones() -> None:
    assert names_of(reward_sections.RewardTerm) == set(REWARDS)
    assert names_of(schema.ObjectiveTerm) == set(OBJECTIVES)
    assert names_of(search_sections.SearchTerm) == set(METHODS) == set(search_sections.SEARCHES)
    assert literals(schema.Prompts.model_fields["set"].annotation) == {*SHIPPED, *DOWNLOADED}
    assert literals(schema.Prompts.model_fields["style"].annotation) == set(HPDV2_STYLES)


# -- every key is read --------------------------------------------------------------------------------------------


def test_the_reader_tells_sections_apart() -> None:
    source = """
from dag.recipe import Recipe, Train as Config
from dag.recipe.reward_sections import Compressibility, Custom, ClipScore as Section
def f(config: Recipe, terms: list[Compressibility | Custom]):
    train, rate = config.train, config.flow.learning_rate
    other.epochs
    train.updates = 3
    return train.seed, [term.model_dump(exclude={"name", "weight"}) for term in terms], config.model_dump()
class A:
    def __init__(self, options: Config):
        self.options = options
    def g(self):
        return self.options.clip_norm
def chosen(recipe: Recipe) -> Config: ...
chosen(x).epochs
class B:
    def __init__(self, section: Section):
        self.scale = section.scale
"""
    assert fields_read(source) == {
        ("Recipe", "train"),
        ("Recipe", "flow"),
        ("Flow", "learning_rate"),
        ("Train", "clip_norm"),
        ("Train", "epochs"),
        ("Custom", "path"),
        ("ClipScore", "scale"),
        ("ImageText", "scale"),
    }


def test_every_key_of_the_schema_is_read_somewhere() -> None:
    names = (
        "schema",
        "load",
        "section",
        "contradictions",
        "network_sections",
        "data_sections",
        "reward_sections",
        "objective_sections",
        "first_order_sections",
        "search_sections",
    )
    schema_files = {ROOT / f"dag/recipe/{name}.py" for name in names}
    paths = [*(ROOT / "dag").rglob("*.py"), ROOT / "train_dag.py"]
    sources = [path.read_text(encoding="utf-8") for path in paths if path not in schema_files]
    for name in (
        "schema",
        "data_sections",
        "objective_sections",
        "first_order_sections",
        "table_sections",
        "search_sections",
    ):
        sources.append(properties_of((ROOT / f"dag/recipe/{name}.py").read_text(encoding="utf-8")))
    read = set().union(*map(fields_read, sources))
    unread = sorted(f"{section}.{field}" for section, field in FIELDS - read)
    assert not unread, "keys that change nothing"
