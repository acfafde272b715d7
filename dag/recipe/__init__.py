"""Recipes: their schema, how a file is read and checked, and their prompts. Imports no torch."""

from dag.recipe.contradictions import validate
from dag.recipe.network_sections import Flow, OptimizerKind, RewardCritic
from dag.recipe.objective_sections import (
    Balance,
    Beta,
    DetailedBalance,
    ForwardLooking,
    KLDivergence,
    NablaBalance,
    ObjectiveTerm,
    PolicyGradient,
    ScalarBalance,
    Target,
    TrajectoryBalance,
    is_scored,
)
from dag.recipe.reward_sections import RewardTerm, Tower
from dag.recipe.schema import (
    Adapter,
    Checkpoint,
    Evaluation,
    Memory,
    Model,
    Prompts,
    Recipe,
    Regulariser,
    Sampler,
    Train,
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
    "NablaBalance",
    "ObjectiveTerm",
    "OptimizerKind",
    "PolicyGradient",
    "Prompts",
    "Recipe",
    "Regulariser",
    "RewardCritic",
    "RewardTerm",
    "Sampler",
    "ScalarBalance",
    "Target",
    "Tower",
    "Train",
    "TrajectoryBalance",
    "is_scored",
    "validate",
]
