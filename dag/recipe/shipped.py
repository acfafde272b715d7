"""Where the recipes that ship with this code are: in its checkout, or where `pip install` put them. Imports no torch."""

import sysconfig
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2] / "recipes"
# [tool.setuptools.data-files] in pyproject.toml puts them there.
_INSTALLED = Path("share/dag-align/recipes")
SCHEMA = "recipe.schema.json"


def is_checkout() -> bool:
    """Whether this code runs from a checkout of its repository, with documents and tests beside it."""
    return (_CHECKOUT / SCHEMA).is_file()


def folder() -> Path:
    """The folder of the shipped recipes, with its subfolders as in a checkout."""
    return _CHECKOUT if is_checkout() else Path(sysconfig.get_path("data")) / _INSTALLED


def found(path: str | Path) -> Path:
    """`path`, or, if there is no such file and it begins with `recipes`, the shipped recipe of that name, where there is one."""
    given = Path(path)
    if given.exists() or given.parts[:1] != ("recipes",):
        return given
    there = folder().joinpath(*given.parts[1:])
    return there if there.is_file() else given
