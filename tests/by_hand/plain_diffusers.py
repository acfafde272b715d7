"""Draws pictures from a run's LoRA with plain diffusers; only the noise is this project's.

As a command, `python tests/by_hand/plain_diffusers.py RUN` prints the largest pixel difference from this project's pictures.
"""

import json
import sys
from pathlib import Path

import torch
from dag_kernels import standard_normal
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from dag.chain.schedule import INITIAL_NOISE
from dag.models.source import resolve
from dag.recipe import Memory, Recipe


@torch.no_grad()
def pictures(recipe: Recipe, folder: Path, weight_name: str, prompts: list[str], sample_id: list[int]) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] from StableDiffusionPipeline's own text encoder, UNet, scheduler and VAE."""
    pipeline = StableDiffusionPipeline.from_pretrained(resolve(recipe.model), dtype=torch.float32, safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name=weight_name)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(recipe.sampler.steps)
    guidance, ids = recipe.sampler.guidance_scale, torch.tensor(sample_id)
    text, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    shape = (
        pipeline.unet.config.in_channels,
        pipeline.unet.config.sample_size,
        pipeline.unet.config.sample_size,
    )
    x_t = standard_normal(recipe.seed, ids, INITIAL_NOISE, shape)
    for k, t in enumerate(scheduler.timesteps):
        output = pipeline.unet(x_t, t, encoder_hidden_states=text).sample
        if guidance > 1:
            uncond = pipeline.unet(x_t, t, encoder_hidden_states=empty).sample
            output = uncond + guidance * (output - uncond)
        noise = standard_normal(recipe.seed, ids, k, shape)
        x_t = scheduler.step(output, t, x_t, eta=recipe.sampler.eta, variance_noise=noise).prev_sample
    images = pipeline.vae.decode(x_t / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


def main(run: Path) -> None:
    from safetensors.torch import load_file

    from dag.chain.rollout import generate
    from dag.chain.sample_ids import FIXED_EVALUATION
    from dag.models import families
    from dag.recipe.prompts import load_prompts
    from dag.run.checkpoint import chosen

    recipe = Recipe.model_validate(json.loads((run / "run.json").read_text())["recipe"])
    prompts = list(load_prompts(recipe.prompts).training[:8])
    ids = [FIXED_EVALUATION + i for i in range(len(prompts))]
    policy = families.load(recipe.model_copy(update={"memory": Memory()}), torch.device("cpu"))
    text = policy.encode(prompts)
    policy.load_state_dict(load_file(chosen(run / "checkpoints") / "policy.safetensors"))
    ours = generate(policy, text, ids, recipe.seed, recipe.sampler)
    for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        difference = (pictures(recipe, run / "lora", name, prompts, ids) - ours).abs().max()
        print(f"{name}: largest difference of {len(prompts)} pictures {255 * float(difference):.4f} of 255 grey levels")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
