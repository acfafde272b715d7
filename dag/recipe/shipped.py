"""Where the recipes that ship with this code are: in its checkout, or where `pip install` put them. Imports no torch."""

import sysconfig
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2] / "recipes"
# [tool.setuptools.data-files] in pyproject.toml puts them there.
_INSTALLED = Path("share/dag-align/recipes")
SCHEMA = "recipe.schema.json"


def folder() -> Path:
    """The folder of the shipped recipes, with its subfolders as in a checkout."""
    return _CHECKOUT if (_CHECKOUT / SCHEMA).is_file() else Path(sysconfig.get_path("data")) / _INSTALLED
