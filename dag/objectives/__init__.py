"""Objectives: from a `Transition` to a loss. The recipe's `objective.name` chooses one."""

from dag.objectives import dag_db, dag_kl, ddpo  # noqa: F401  (registers them)
from dag.objectives.registry import OBJECTIVES, Objective, ObjectiveOutput

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput"]
