"""Recipes: their schema, how a file is read and checked, and their prompts. Imports no torch."""

from dag.recipe.objective_sections import (
    Balance,
    Beta,
    DetailedBalance,
    ForwardLooking,
    KLDivergence,
    ObjectiveTerm,
    PolicyGradient,
    is_scored,
)
from dag.recipe.reward_sections import RewardTerm, Tower
from dag.recipe.schema import (
    Adapter,
    Checkpoint,
    Evaluation,
    Flow,
    Memory,
    Model,
    OptimizerKind,
    Prompts,
    Recipe,
    Regulariser,
    Sampler,
    Train,
    validate,
)

__all__ = [
    "Adapter",
    "Balance",
    "Beta",
    "Checkpoint",
    "DetailedBalance",
    "Evaluation",
    "Flow",
    "ForwardLooking",
    "KLDivergence",
    "Memory",
    "Model",
    "ObjectiveTerm",
    "OptimizerKind",
    "PolicyGradient",
    "Prompts",
    "Recipe",
    "Regulariser",
    "RewardTerm",
    "Sampler",
    "Tower",
    "Train",
    "is_scored",
    "validate",
]
