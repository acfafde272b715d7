"""Text encoder and UNet, trained together on cached latents; saved as a StableDiffusionPipeline folder."""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dag.assets.build.clock import Clock
from dag.assets.build.data import Dataset
from dag.assets.build.scorer import text_config
from dag.assets.build.tokenizer import MAX_TOKENS
from dag.assets.build.vae import encode


@dataclass(frozen=True)
class DenoiserSettings:
    """How text encoder and UNet are trained."""

    minutes: float = 48.0
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    caption_dropout: float = 0.1
    snr_cap: float = 5.0
    ema: float = 0.999
    constant_share: float = 0.5
    """Share of the time before the cosine decay begins."""
    checkpoint_minutes: float = 6.0
    seed: int = 4


def scheduler() -> DDIMScheduler:
    """A DDIM scheduler with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_unet() -> UNet2DConditionModel:
    """The embedded model's UNet with random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def cache_latents(work: Path, dataset: Dataset) -> Tensor:
    """Scaled latents (N, 4, 16, 16) of the training pictures, computed once and stored in `work`."""
    path = work / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        torch.save(encode(vae, dataset.pictures[: dataset.training]) * vae.config.scaling_factor, path)
    return torch.load(path, weights_only=True)


class Averaged:
    """The exponential moving average of parameters; `swap` puts it in their place for saving."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; the decay rises over the first updates."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages; a second call undoes the first."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def train(
    work: Path,
    out: Path,
    dataset: Dataset,
    clock: Clock,
    settings: DenoiserSettings = DenoiserSettings(),
    from_shipped: bool = False,
) -> None:
    """Train for a fixed time; the averaged weights go to `out`/embedded every few minutes, and at the end.

    Args:
        from_shipped: start from the weights in `out`/embedded instead of from scratch, with another seed.
    """
    torch.manual_seed(settings.seed + from_shipped)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    latents, unet, text = cache_latents(work, dataset), new_unet(), CLIPTextModel(text_config(tokenizer))
    if from_shipped:
        shipped = out / "embedded"
        unet = UNet2DConditionModel.from_pretrained(shipped, subfolder="unet", torch_dtype=torch.float32)
        text = CLIPTextModel.from_pretrained(shipped / "text_encoder", dtype=torch.float32)
    else:
        # Start from the scorer's text encoder, which tells words apart: a new one takes thousands of steps to learn that.
        scorer = CLIPModel.from_pretrained(work / "scorer", dtype=torch.float32)
        text.load_state_dict(scorer.text_model.state_dict())
    captions = [scene.caption for scene in dataset.scenes[: dataset.training]]
    ids = torch.tensor(tokenizer([*captions, ""], padding="max_length", max_length=MAX_TOKENS).input_ids)
    unet = unet.to(memory_format=torch.channels_last)
    alpha_bar = scheduler().alphas_cumprod
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
    averaged = Averaged(parameters, settings.ema)
    saved_at, losses = 0.0, []
    for step, progress in enumerate(clock.ticks(settings.minutes), start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1, step / 200) * _decay(progress, settings.constant_share)
        rows = torch.randint(len(latents), (settings.batch,))
        dropped = torch.rand(settings.batch) < settings.caption_dropout
        tokens = ids[torch.where(dropped, len(ids) - 1, rows)]
        loss = denoising_loss(unet, text, latents[rows], tokens, alpha_bar, settings.snr_cap)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averaged.update()
        losses.append(float(loss.detach()))
        if step % 100 == 0:
            print(f"denoiser {step} loss {sum(losses[-100:]) / 100:.4f} {100 * progress:.0f} %", flush=True)
        if (progress - saved_at) * settings.minutes > settings.checkpoint_minutes:
            saved_at = progress
            averaged.swap()
            save(work, out, unet, text)
            averaged.swap()
    averaged.swap()
    save(work, out, unet, text)


def _decay(progress: float, constant_share: float) -> float:
    """The factor of the learning rate: 1, then a cosine down to 0.02."""
    if progress < constant_share:
        return 1.0
    return max(0.02, 0.5 * (1 + math.cos(math.pi * (progress - constant_share) / (1 - constant_share))))


def denoising_loss(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    latents: Tensor,
    tokens: Tensor,
    alpha_bar: Tensor,
    snr_cap: float,
) -> Tensor:
    """Mean squared error of the predicted noise, weighted by min(SNR, cap) / SNR (Hang et al. 2023), averaged over the batch.

    Args:
        latents: (B, 4, 16, 16) scaled clean latents.
        tokens:  (B, 24) token ids of their captions.
    """
    t = torch.randint(len(alpha_bar), (len(latents),))
    eps = torch.randn_like(latents)
    level = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = level.sqrt() * latents + (1 - level).sqrt() * eps
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(x_t.contiguous(memory_format=torch.channels_last), t, text(tokens)[0]).sample
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    return ((output.float() - eps).square().mean((1, 2, 3)) * (snr.clamp(max=snr_cap) / snr)).mean()


def save(work: Path, out: Path, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
    """Save the complete pipeline in half precision to `out`/embedded; the trained modules are copied, not changed."""
    fresh_unet, fresh_text = new_unet(), CLIPTextModel(text.config)
    fresh_unet.load_state_dict(unet.state_dict())
    fresh_text.load_state_dict(text.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=fresh_text,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=fresh_unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)
    folder, fresh = out / "embedded", out / "embedded.new"
    pipeline.save_pretrained(fresh)
    rewrite(fresh / "vae/config.json", lambda config: config.pop("_name_or_path", None))
    # Without a dtype argument transformers loads in the dtype of this config, and diffusers in float32: they must agree.
    rewrite(fresh / "text_encoder/config.json", lambda config: config.update(dtype="float32"))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, fresh / "tokenizer" / name)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON config and write it back."""
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
