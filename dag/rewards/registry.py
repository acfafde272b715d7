"""The dict of rewards, apart from the package's __init__ so that each reward can import it."""

from dag.recipe.registry import Registry

REWARDS = Registry("reward")
