"""Objectives: from a `Transition` to a loss. The recipe's `objective.name` chooses one."""

import importlib
import pkgutil

from dag.objectives.registry import OBJECTIVES, Objective, ObjectiveOutput, UpdateScalars

# An objective registers itself when its module is imported.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput", "UpdateScalars"]
