"""A tiny decoder of the embedded model's latents, for previews: an AutoencoderTiny distilled from the full VAE."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dag.assets.build.data import Dataset
from dag.assets.build.denoiser import cache_latents
from dag.assets.build.tokenizer import MAX_TOKENS
from dag.assets.build.vae import encode, reconstruction_loss

# Batch size of everything that is not training.
_BATCH = 64


@dataclass(frozen=True)
class TinyVaeSettings:
    """How the tiny decoder is built, trained and measured."""

    latents: int = 10_000
    """Number of x0_hat to learn from."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    """Guidance scales of these x0_hat, in equal parts."""
    steps: int = 6_000
    batch: int = 16
    learning_rate: float = 3e-3
    channels: int = 16
    blocks: tuple[int, ...] = (4, 4, 0)
    """Residual blocks at each resolution, from 16x16 to 64x64."""
    seed: int = 6
    measured: int = 256
    """Held-out pictures to measure on."""
    measured_timesteps: tuple[int, ...] = (50, 250, 500, 750, 950)


def new_tiny_vae(settings: TinyVaeSettings) -> AutoencoderTiny:
    """A tiny decoder with random weights. Its encoder is a stub that is never trained: only the class needs one."""
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(settings.channels,) * len(settings.blocks),
        num_decoder_blocks=settings.blocks,
    )


@torch.no_grad()
def predicted(
    pipeline: StableDiffusionPipeline, latents: Tensor, captions: list[str], timesteps: Tensor, guidance: float
) -> Tensor:
    """x0_hat (B, 4, 16, 16) of latents that were noised to these timesteps (B,)."""
    level = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = level.sqrt() * latents + (1 - level).sqrt() * torch.randn_like(latents)
    ids = pipeline.tokenizer(
        [*captions, ""], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
    words = pipeline.text_encoder(ids)[0]
    parts = []
    for rows in torch.arange(len(latents)).split(_BATCH):
        x_t, t = noisy[rows].contiguous(memory_format=torch.channels_last), timesteps[rows]
        eps = pipeline.unet(x_t, t, words[rows]).sample
        if guidance > 1:
            free = pipeline.unet(x_t, t, words[-1:].expand(len(rows), -1, -1)).sample
            eps = free + guidance * (eps - free)
        parts.append((x_t - (1 - level[rows]).sqrt() * eps) / level[rows].sqrt())
    return torch.cat(parts).contiguous()


@torch.no_grad()
def full_decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The full decoder's pictures (B, 3, 64, 64), float16 in [-1, 1], which the tiny decoder learns to imitate."""
    parts = [vae.decode(part / vae.config.scaling_factor).sample.half() for part in latents.split(_BATCH)]
    return torch.cat(parts).clamp(-1, 1).contiguous()


def train(work: Path, out: Path, dataset: Dataset, settings: TinyVaeSettings = TinyVaeSettings()) -> None:
    """Train the tiny decoder on the model's own x0_hat, save it to `out`/embedded/vae_tiny, and print its agreement.

    All noise levels are needed: x0_hat at high noise is unlike the latent of any picture, the more so with guidance; at low
    noise it is almost the clean latent.
    """
    torch.manual_seed(settings.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(out / "embedded", dtype=torch.float32)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    inputs = _training_latents(pipeline, cache_latents(work, dataset), dataset, settings)
    targets = full_decode(pipeline.vae, inputs)
    print(f"tiny_vae: {len(inputs)} latents", flush=True)

    tiny = new_tiny_vae(settings).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    recent = []
    for step in range(settings.steps):
        decay = max(0.02, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1, (step + 1) / 100) * decay
        rows = torch.randint(len(inputs), (settings.batch,))
        y = tiny.decode(inputs[rows].contiguous(memory_format=torch.channels_last)).sample
        x = targets[rows].float().contiguous(memory_format=torch.channels_last)
        loss = reconstruction_loss(y, x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
        optimizer.step()
        recent.append(float(functional.mse_loss(y, x).detach()))
        if (step + 1) % 500 == 0:
            print(f"tiny_vae {step + 1}/{settings.steps} psnr {_psnr(sum(recent[-500:]) / 500):.2f} dB", flush=True)
    save(tiny, out / "embedded/vae_tiny")
    report(pipeline, out, dataset, settings)


def save(tiny: AutoencoderTiny, folder: Path) -> None:
    """Save in half precision, without the one setting that diffusers writes and then warns of when it loads the file."""
    tiny.eval().half().save_pretrained(folder)
    config = folder / "config.json"
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "block_out_channels"}
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _training_latents(
    pipeline: StableDiffusionPipeline, clean: Tensor, dataset: Dataset, settings: TinyVaeSettings
) -> Tensor:
    """x0_hat of random training pictures at random timesteps, in equal parts for the guidance scales."""
    rows = torch.randperm(len(clean))[: settings.latents]
    timesteps = torch.randint(len(pipeline.scheduler.alphas_cumprod), (settings.latents,))
    scales = settings.guidance_scales
    parts = []
    for guidance, some, t in zip(scales, rows.chunk(len(scales)), timesteps.chunk(len(scales)), strict=True):
        captions = [dataset.scenes[row].caption for row in some.tolist()]
        parts.append(predicted(pipeline, clean[some], captions, t, guidance))
    return torch.cat(parts)


def _psnr(squared_error: float) -> float:
    """PSNR in dB of pictures in [-1, 1], from their mean squared error."""
    return 10 * math.log10(4 / squared_error)


@torch.no_grad()
def agreement(tiny: AutoencoderTiny, vae: AutoencoderKL, latents: Tensor) -> float:
    """PSNR in dB of the tiny decoder's pictures against the full decoder's."""
    pictures = torch.cat([tiny.decode(part).sample for part in latents.split(_BATCH)]).clamp(-1, 1)
    return _psnr(float(functional.mse_loss(pictures, full_decode(vae, latents).float())))


@torch.no_grad()
def decode_flop(vae: AutoencoderKL | AutoencoderTiny) -> int:
    """Floating-point operations of one decoded picture."""
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(1, 4, 16, 16))
    return counter.get_total_flops()


def report(pipeline: StableDiffusionPipeline, out: Path, dataset: Dataset, settings: TinyVaeSettings) -> None:
    """Print the figures of the model card, measured with the saved file on held-out scenes."""
    tiny = AutoencoderTiny.from_pretrained(out / "embedded/vae_tiny").eval()
    vae, rows = pipeline.vae, slice(dataset.training, dataset.training + settings.measured)
    clean = encode(vae, dataset.pictures[rows]) * vae.config.scaling_factor
    captions = [scene.caption for scene in dataset.scenes[rows]]
    print(f"clean latents: {agreement(tiny, vae, clean):.1f} dB")
    for guidance in settings.guidance_scales:
        for timestep in settings.measured_timesteps:
            x0_hat = predicted(pipeline, clean, captions, torch.full((len(clean),), timestep), guidance)
            print(f"x0_hat at t = {timestep}, guidance {guidance:g}: {agreement(tiny, vae, x0_hat):.1f} dB")
    print(f"decoding: {decode_flop(tiny) / 1e6:.0f} MFLOP, in full {decode_flop(vae) / 1e6:.0f} MFLOP", flush=True)
