"""Makes the chain of a model's own scheduler, as its config describes it, and a recipe's sampler."""

from pathlib import Path

from diffusers import DDIMScheduler

from dag.chain.levels import PREDICTION_TYPES, Levels
from dag.chain.schedule import Schedule
from dag.errors import RunError, UsageError
from dag.models.source import read_config
from dag.recipe import Sampler


def chain_of(folder: Path, sampler: Sampler, tokens: int) -> Schedule:
    """The chain of the model in a diffusers folder.

    Args:
        tokens: of a picture inside the denoiser, on which the noise levels of some models depend.

    Raises:
        UsageError: the sampler asks for what this model cannot do.
        RunError:   the scheduler's config cannot be read, or names an unknown prediction.
    """
    config = read_config(folder, "scheduler")
    is_flow = str(config.get("_class_name", "")).startswith("FlowMatch")
    prediction_type = "velocity" if is_flow else config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise RunError(f"model.path: {folder} predicts {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    if sampler.shift is not None and not is_flow:
        raise UsageError("sampler.shift is for flow-matching models, which this is not; leave it out")
    try:
        if is_flow:
            levels = Levels.of_flow(config, sampler.steps, tokens, sampler.shift)
        else:
            scheduler = DDIMScheduler.from_config({**config, "clip_sample": False})
            levels = Levels.of_diffusion(scheduler, sampler.steps)
        return Schedule.from_levels(levels, prediction_type, sampler.eta, sampler.sde)
    except ValueError as error:
        raise UsageError(str(error)) from None
