"""Loads a recipe's model: the files at `model.path` decide which family's class runs it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from dag_kernels import PLAIN, Kernels

from dag.chain.policy import Policy
from dag.chain.schedule import Schedule
from dag.models.flux import Flux
from dag.models.latent_diffusion import LatentDiffusion
from dag.models.norms import fuse_norms
from dag.models.scheduler import chain_of
from dag.models.sd import StableDiffusion
from dag.models.sd3 import StableDiffusion3
from dag.models.sdxl import StableDiffusionXL
from dag.models.source import counted_as, latent_shape, local_folder, resolve
from dag.recipe import ForwardLooking, Recipe

FAMILIES: dict[str, type[LatentDiffusion]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""The class of each family, by the pipeline that a diffusers folder names in its model_index.json.

A folder with another pipeline, or with none, is loaded as Stable Diffusion, which reports what does not fit."""


def load(
    recipe: Recipe,
    device: torch.device,
    forward_looking: ForwardLooking | None = None,
    kernels: Kernels = PLAIN,
) -> Policy:
    """The recipe's model as a policy, downloaded if need be.

    Args:
        forward_looking: the section that says how previews are decoded; None if there are none.
        kernels:         the operations of its schedule; fused ones also normalise in its networks.

    Raises:
        UsageError: the recipe asks for what this model cannot do.
        RunError:   the model cannot be found, downloaded or read.
    """
    folder = resolve(recipe.model)
    policy = _family(folder)(recipe, folder, device, forward_looking)
    policy.schedule = replace(policy.schedule, kernels=kernels)
    # torch.compile of the complete UNet fuses its norms itself. On a CPU Triton's interpreter would take hours for a network.
    has_fused = kernels.name == "triton" and device.type != "cpu"
    if has_fused and recipe.memory.channels_last and recipe.memory.compile != "unet":
        for network in policy.modules():
            fuse_norms(network, kernels)
    return policy


def schedule_of(recipe: Recipe) -> Schedule:
    """The chain of a recipe's model from its configs alone, or from those of the architecture that a hub id is taken for.

    Raises UsageError and RunError as `load` does.
    """
    folder = local_folder(counted_as(recipe.model.path))
    assert folder is not None
    family = _family(folder)
    shape = latent_shape(folder, recipe.model.resolution, family.patch)
    return chain_of(folder, recipe.sampler, family.tokens(shape))


def _family(folder: Path) -> type[LatentDiffusion]:
    return FAMILIES.get(_pipeline(folder) or "", StableDiffusion)


def pipeline_of(path: str) -> str:
    """The name of the diffusers pipeline of a model, by its folder, or by the hub id if it is not on this machine."""
    folder = local_folder(counted_as(path))
    found = None if folder is None else _pipeline(folder)
    return found if found in FAMILIES else "StableDiffusionPipeline"


def _pipeline(folder: Path) -> str | None:
    """The pipeline that model_index.json names; None if it names none or cannot be read."""
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
