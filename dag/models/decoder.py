"""Decodes latents to pictures: by the VAE, or by a cheaper decoder to show predicted latents to a reward. Encodes given pictures.

Gradients reach latents that require them, and nothing else.

Legend: B samples, H W the picture's size in pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from dag import hub, recipe
from dag.errors import UsageError
from dag.models.source import EMBEDDED, EMBEDDED_FLOW, is_architecture, local_folder
from dag.models.weights import load_module, random_weights


class Decoder:
    """The VAE, and the tiny autoencoder if the recipe asks for one.

    Args:
        folder:  the model's folder.
        tile:    pictures per call, unless `memory.decode_batch` says otherwise.
        forward_looking: the section that says how previews are decoded; None if there are none.
        tiny_at_hub: the AutoencoderTiny for the model's latents.
    """

    def __init__(
        self,
        folder: Path,
        variant: str | None,
        dtype: torch.dtype,
        device: torch.device,
        tile: int,
        memory: recipe.Memory,
        forward_looking: recipe.ForwardLooking | None = None,
        tiny_at_hub: str = "",
    ) -> None:
        self.device, self.batch, self.offloads = device, memory.decode_batch or tile, memory.offload_vae
        self.layout = torch.channels_last if memory.channels_last else torch.contiguous_format
        self.vae = load_module(AutoencoderKL, folder, "vae", dtype, device, variant).to(memory_format=self.layout)
        self.side = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.kind = "full" if forward_looking is None else forward_looking.decoder
        self.tiny = None
        if forward_looking is not None and forward_looking.decoder == "tiny":
            channels = int(self.vae.config.latent_channels)
            self.tiny = _load_tiny(forward_looking.decoder_path, tiny_at_hub, folder, channels, dtype, device)
            self.tiny.to(memory_format=self.layout)
        if memory.checkpointing != "none":
            for vae in (self.vae, self.tiny):
                # Acts only where the reward's gradient is taken through the decoder.
                if vae is not None:
                    vae.enable_gradient_checkpointing()
        self._move(torch.device("cpu"))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A context in which an offloaded VAE is on the device."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        if self.offloads and self.device.type != "meta":
            self.vae.to(device)

    def __call__(self, x_0: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1] of latents x_0, by the VAE."""
        config = self.vae.config
        return self._decoded(self.vae, x_0 / config.scaling_factor + (config.get("shift_factor") or 0.0))

    def preview(self, x0_hat: Tensor, kind: str | None = None) -> Tensor:
        """Decode x0_hat with `kind` (default: the recipe's); `tiny` needs a recipe that loaded it.

        Args:
            kind: a value of `forward_looking.decoder`.

        Returns:
            (B, 3, H, W) float32 images in [0, 1].
        """
        kind = kind or self.kind
        if kind == "tiny":
            # Tiny autoencoders take latents as the denoiser has them, without the VAE's scale and shift.
            return self._decoded(self.tiny, x0_hat)
        if kind == "half":
            small = self(functional.avg_pool2d(x0_hat.float(), 2))
            # Enlarged, so that the reward gets the size of the final picture.
            return functional.interpolate(small, scale_factor=2, mode="bilinear").clamp(0, 1)
        return self(x0_hat)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, C, h, w) float32 latents of images (B, 3, H, W) in [0, 1]: the mean of the VAE's posterior."""
        latents, dtype, config = [], next(self.vae.parameters()).dtype, self.vae.config
        for part in (2 * images.to(self.device) - 1).split(self.batch):
            posterior = self.vae.encode(part.to(dtype).contiguous(memory_format=self.layout)).latent_dist
            latents.append(config.scaling_factor * (posterior.mode().float() - (config.get("shift_factor") or 0.0)))
        return torch.cat(latents)

    def _decoded(self, vae: Any, latents: Tensor) -> Tensor:
        images, dtype = [], next(vae.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            for part in latents.float().split(self.batch):
                image = vae.decode(part.to(dtype).contiguous(memory_format=self.layout), return_dict=False)[0]
                images.append((image.float() / 2 + 0.5).clamp(0, 1))
            return torch.cat(images)


def _load_tiny(
    path: str | None, at_hub: str, folder: Path, channels: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """The AutoencoderTiny; for a model without weights, diffusers' default architecture, which is TAESD's."""
    if is_architecture(folder) or (device.type == "meta" and folder not in (EMBEDDED, EMBEDDED_FLOW)):
        made = random_weights(lambda _: AutoencoderTiny(latent_channels=channels), None, dtype, device)
        return made.eval().requires_grad_(False)
    found = _tiny_folder(path, at_hub, folder)
    return load_module(AutoencoderTiny, found.parent, found.name, dtype, device)


def _tiny_folder(path: str | None, at_hub: str, folder: Path) -> Path:
    """The folder of the AutoencoderTiny, downloaded if need be."""
    key = "objective.forward_looking.decoder_path"
    if path is None and folder in (EMBEDDED, EMBEDDED_FLOW):
        return EMBEDDED / "vae_tiny"
    path = path or at_hub
    found = local_folder(path)
    if found is None:
        hint = f"or give a local AutoencoderTiny folder: --set {key}=/path/to/folder"
        found = hub.snapshot(key, path, ["config.json", "diffusion_pytorch_model.safetensors"], hint)
    if not (found / "config.json").is_file():
        raise UsageError(f"{key}: {found} has no config.json; a diffusers AutoencoderTiny folder is needed")
    return found.resolve()
