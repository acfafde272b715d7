"""Objectives: pure functions of a `Transition`, chosen by the recipe's `objective.name`."""

import importlib
import pkgutil

from dag.objectives.registry import OBJECTIVES, Objective, ObjectiveOutput

# An objective registers itself when its module is imported.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput"]
