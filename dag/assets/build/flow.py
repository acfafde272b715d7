"""A flow-matching model distilled from the embedded one: the same UNet learns the velocity eps - x_0 of the model's own latents.

Guidance is built in: the teacher's pictures are drawn with it, so the student needs one pass a step. Needs the shipped model alone,
no drawings. Runs on a GPU if there is one.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from dag.assets.build.denoiser import Averaged, rewrite
from dag.assets.build.scenes import STYLES, TEXTURES, SceneMaker, Thing
from dag.assets.build.tokenizer import MAX_TOKENS
from dag.evaluation.judge import COLOURS, NOUNS, SHAPES
from dag.recipe.prompt_sets import with_article

_DRAWN_AT_ONCE = 256


@dataclass(frozen=True)
class FlowSettings:
    """How the student is trained."""

    latents: int = 16_384
    """Pictures of the teacher to learn from."""
    held_out: int = 1_024
    """Further pictures, on which the loss is measured."""
    teacher_steps: int = 20
    guidance: float = 3.0
    steps: int = 3_000
    batch: int = 128
    learning_rate: float = 4e-4
    weight_decay: float = 1e-2
    ema: float = 0.999
    uniform_share: float = 0.25
    """Share of the noise levels drawn evenly from 0 to 1; the others are a sigmoid of a normal variable."""
    measured_levels: tuple[float, ...] = (0.2, 0.5, 0.8, 0.92)
    seed: int = 8


def caption(rng: random.Random) -> str:
    """A caption of the model's language; half of them are a noun alone, as most prompts are."""
    if rng.random() < 0.5:
        return with_article(rng.choice(NOUNS))
    background = rng.choice(COLOURS)
    first, second = _thing(rng, background), _thing(rng, background)
    if rng.random() < 0.1:
        words = f"{SceneMaker.describe(rng, first)} and {SceneMaker.describe(rng, second)}"
    else:
        words = SceneMaker.describe(rng, first, rng.choices((1, 2, 3, 4), (6, 1, 1, 1))[0])
    return words + SceneMaker.describe_background(rng, background, rng.choice(TEXTURES))


def _thing(rng: random.Random, background: str) -> Thing:
    if rng.random() < 0.3:
        return Thing(rng.choice(SHAPES), rng.choice([colour for colour in COLOURS if colour != background]), None)
    return Thing(rng.choice(NOUNS), None, rng.choice(STYLES))


@torch.no_grad()
def draw(teacher: StableDiffusionPipeline, captions: list[str], settings: FlowSettings) -> tuple[Tensor, Tensor]:
    """The teacher's latents (N, 4, 16, 16) of captions, and the embeddings (N, S, D) of these, on its device."""
    latents, words = [], []
    for start in range(0, len(captions), _DRAWN_AT_ONCE):
        some = captions[start : start + _DRAWN_AT_ONCE]
        generator = torch.Generator().manual_seed(settings.seed + start)
        drawn = teacher(
            some,
            num_inference_steps=settings.teacher_steps,
            guidance_scale=settings.guidance,
            eta=1.0,
            generator=generator,
            output_type="latent",
        )
        latents.append(drawn.images)
        ids = teacher.tokenizer(some, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        words.append(teacher.text_encoder(ids.to(teacher.device))[0])
    return torch.cat(latents), torch.cat(words)


def velocity_loss(unet: UNet2DConditionModel, x_0: Tensor, words: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """() the mean squared error of the velocity at noise levels (B,)."""
    s = level[:, None, None, None]
    x_t = ((1 - s) * x_0 + s * eps).contiguous(memory_format=torch.channels_last)
    return functional.mse_loss(unet(x_t, 1000 * level, words).sample, eps - x_0)


@torch.no_grad()
def teachers_loss(teacher: StableDiffusionPipeline, x_0: Tensor, words: Tensor, level: float, eps: Tensor) -> float:
    """The teacher's own loss without guidance, by a change of variables, at the nearest of its timesteps."""
    alpha_bars = teacher.scheduler.alphas_cumprod.to(x_0.device)
    wanted = (1 - level) ** 2 / ((1 - level) ** 2 + level**2)
    t = int((alpha_bars - wanted).abs().argmin())
    signal, noise = alpha_bars[t].sqrt(), (1 - alpha_bars[t]).sqrt()
    x_t = (signal * x_0 + noise * eps).contiguous(memory_format=torch.channels_last)
    eps_hat = teacher.unet(x_t, torch.full((len(x_0),), t, device=x_0.device), words).sample
    return float(functional.mse_loss(eps_hat - (x_t - noise * eps_hat) / signal, eps - x_0))


def train(out: Path, settings: FlowSettings = FlowSettings()) -> None:
    """Distil `out`/embedded to `out`/embedded_flow, which holds the UNet and the scheduler; text encoder and VAE are shared."""
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = StableDiffusionPipeline.from_pretrained(out / "embedded", dtype=torch.float32).to(device)
    teacher.set_progress_bar_config(disable=True)
    teacher.unet.to(memory_format=torch.channels_last)
    rng = random.Random(settings.seed)
    latents, words = draw(teacher, [caption(rng) for _ in range(settings.latents + settings.held_out)], settings)
    print(f"flow: {len(latents)} latents of the teacher", flush=True)
    student = UNet2DConditionModel.from_pretrained(out / "embedded", subfolder="unet", torch_dtype=torch.float32)
    student.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    averaged = Averaged(student.parameters(), settings.ema)
    recent: list[Tensor] = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            group["lr"] = settings.learning_rate * min(1, (step + 1) / 100) * max(0.02, decay)
        rows = torch.randint(settings.latents, (settings.batch,), device=device)
        levels = torch.randn(settings.batch, device=device).sigmoid()
        even = torch.rand(settings.batch, device=device)
        levels = torch.where(torch.rand_like(levels) < settings.uniform_share, even, levels)
        loss = velocity_loss(student, latents[rows], words[rows], levels, torch.randn_like(latents[rows]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        averaged.update()
        recent.append(loss.detach())
        if (step + 1) % 500 == 0:
            print(f"flow {step + 1}/{settings.steps} loss {float(torch.stack(recent[-500:]).mean()):.4f}", flush=True)
    averaged.swap()
    _report(teacher, student, latents[settings.latents :], words[settings.latents :], settings)
    save(student, out / "embedded_flow")


@torch.no_grad()
def _report(
    teacher: StableDiffusionPipeline,
    student: UNet2DConditionModel,
    latents: Tensor,
    words: Tensor,
    settings: FlowSettings,
) -> None:
    """Print the losses of student and teacher on held-out latents."""
    eps = torch.randn_like(latents)
    for level in settings.measured_levels:
        ours = float(velocity_loss(student, latents, words, torch.full_like(latents[:, 0, 0, 0], level), eps))
        print(
            f"flow loss at s = {level:g}: {ours:.3f}, teacher {teachers_loss(teacher, latents, words, level, eps):.3f}"
        )


def save(student: UNet2DConditionModel, folder: Path) -> None:
    """Save UNet and scheduler in half precision, with a model_index.json that names the shared parts too."""
    student.half().save_pretrained(folder / "unet")
    rewrite(folder / "unet/config.json", lambda config: config.pop("_name_or_path", None))
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder.parent / "embedded/model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
