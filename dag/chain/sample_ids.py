"""Which sample ids belong to whom. With the seed and the step an id determines a picture's noise, so ranges never overlap.

A run would have to train 2^40 trajectories to reach the first evaluation.
"""

TRAINING = 0
"""Trajectories of a run, counted on from epoch to epoch."""
FIXED_EVALUATION = 1 << 40
"""Pictures of a run's own evaluations, the same ones every time."""
SAMPLES = 1 << 41
"""Pictures of `python -m dag.sample`."""
COMPARISON = 1 << 42
"""Pictures of `python -m dag.evaluate`, the same ones for every model."""
COMPARISON_AGAIN = 1 << 43
"""The base model's second set of pictures there, from which distances are measured."""
