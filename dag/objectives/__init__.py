"""Objectives: pure functions of a `Transition`, chosen by the recipe's `objective.name`."""

from dag.objectives import dag_db, dag_kl, ddpo  # noqa: F401  (registers them)
from dag.objectives.registry import OBJECTIVES, Objective, ObjectiveOutput

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput"]
