"""The ranges of sample ids, one for each purpose.

The id, the seed and the step determine a picture's noise, so no two purposes share ids: training would have to sample 2^40
trajectories to reach the next range.
"""

TRAINING = 0
"""First id of a run's trajectories, which are counted through all epochs."""
FIXED_EVALUATION = 1 << 40
"""First id of the pictures in a run's evaluations; every evaluation has the same ids."""
SAMPLES = 1 << 41
"""First id of the pictures of `python -m dag.sample`."""
COMPARISON = 1 << 42
"""First id of the pictures of `python -m dag.evaluate`; every model has the same ids."""
COMPARISON_AGAIN = 1 << 43
"""First id of the base model's second set of pictures in `python -m dag.evaluate`, to which distances are measured."""
