"""Recipes: their schema, how a file is read and checked, and their prompts. Imports no torch."""

from dag.recipe.contradictions import validate
from dag.recipe.data_sections import Data
from dag.recipe.first_order_sections import AdjointMatching, Backpropagation, RewardFeedback
from dag.recipe.model_sections import Adapter, Model, Sampler, TextAdapter
from dag.recipe.network_sections import Flow, OptimizerKind, RewardCritic
from dag.recipe.objective_sections import (
    Balance,
    Beta,
    DetailedBalance,
    ForwardLooking,
    KLDivergence,
    NablaBalance,
    Objective,
    ScalarBalance,
    Target,
    ValueBalance,
    is_scored,
)
from dag.recipe.reward_sections import RewardTerm, Tower
from dag.recipe.schema import (
    Checkpoint,
    Evaluation,
    Memory,
    ObjectiveTerm,
    Prompts,
    Recipe,
    Regulariser,
    Train,
)
from dag.recipe.table_sections import (
    DirectPreference,
    OnPictures,
    PolicyGradient,
    Regression,
    SubTrajectoryBalance,
    TrajectoryBalance,
)

__all__ = [
    "Adapter",
    "AdjointMatching",
    "Backpropagation",
    "Balance",
    "Beta",
    "Checkpoint",
    "Data",
    "DetailedBalance",
    "DirectPreference",
    "Evaluation",
    "Flow",
    "ForwardLooking",
    "KLDivergence",
    "Memory",
    "Model",
    "NablaBalance",
    "Objective",
    "ObjectiveTerm",
    "OnPictures",
    "OptimizerKind",
    "PolicyGradient",
    "Prompts",
    "Recipe",
    "Regression",
    "Regulariser",
    "RewardCritic",
    "RewardFeedback",
    "RewardTerm",
    "Sampler",
    "ScalarBalance",
    "SubTrajectoryBalance",
    "Target",
    "TextAdapter",
    "Tower",
    "Train",
    "TrajectoryBalance",
    "ValueBalance",
    "is_scored",
    "validate",
]
