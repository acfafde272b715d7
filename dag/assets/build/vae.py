"""Training of the autoencoder: 64x64 pixels to 16x16x4 latents and back."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from dag.assets.build.data import Dataset


@dataclass(frozen=True)
class VaeSettings:
    """How the autoencoder is built and trained."""

    steps: int = 4_000
    batch: int = 16
    learning_rate: float = 1.5e-3
    kl_weight: float = 2e-3
    channels: tuple[int, ...] = (16, 32, 64)
    seed: int = 1


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Convert uint8 pictures (B, 64, 64, 3) to (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of vertical and of horizontal neighbours."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + MSE + L1 of image gradients + half of the L1 at half resolution: keeps edges sharp and areas flat."""
    edges = sum(functional.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
    coarse = functional.l1_loss(functional.avg_pool2d(y, 2), functional.avg_pool2d(x, 2))
    return functional.l1_loss(y, x) + functional.mse_loss(y, x) + edges + 0.5 * coarse


def train(work: Path, dataset: Dataset, settings: VaeSettings = VaeSettings()) -> None:
    """Train, and save to `work`/vae with a scaling factor that gives the latents a standard deviation of 1."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=settings.channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    recent = []
    for step in range(settings.steps):
        progress = step / settings.steps
        rate = settings.learning_rate * min(1, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = np.sort(rng.integers(0, dataset.training, settings.batch))
        x = to_tensor(dataset.pictures[rows]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(y, x) + settings.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent.append(float(functional.mse_loss(y, x).detach()))
        if (step + 1) % 200 == 0:
            print(
                f"vae {step + 1}/{settings.steps} psnr {10 * math.log10(4 / np.mean(recent[-200:])):.2f} dB",
                flush=True,
            )
    vae.eval()
    vae.register_to_config(scaling_factor=1 / float(encode(vae, dataset.pictures[-512:]).std()))
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 128) -> Tensor:
    """The means (N, 4, 16, 16) of the pictures' latents, unscaled."""
    parts = [to_tensor(pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 128) -> Tensor:
    """The pictures after encoding and decoding, (N, 3, 64, 64) float32 in [0, 1]."""
    latents = encode(vae, pictures, batch)
    images = torch.cat([vae.decode(part).sample for part in latents.split(batch)])
    return (images / 2 + 0.5).clamp(0, 1)


def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Peak signal-to-noise ratio of reconstructions in dB."""
    truth = to_tensor(pictures) / 2 + 0.5
    return -10 * math.log10(float(functional.mse_loss(reconstruct(vae, pictures), truth)))
