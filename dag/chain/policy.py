"""The interface of a model family: a diffusion model as a forward policy P_F. `dag.models` has one class for each family.

Legend: B samples, P prompts, S text tokens, D text width, C H W latent.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from dag_kernels import combined
from torch import Tensor, nn

from dag.chain.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """Network outputs at B states, of the schedule's prediction type."""

    branches: Tensor
    """(2B, C, H, W) unconditional, then conditional outputs, in the network's dtype; or (B, C, H, W) if they are combined
    already or there is no guidance."""
    num_samples: int
    """B."""
    guidance_scale: float
    conditional: Tensor
    """(B, C, H, W) the conditional branch alone; equal to `guided` without guidance."""

    @cached_property
    def guided(self) -> Tensor:
        """(B, C, H, W) float32 after classifier-free guidance: the policy's own output."""
        return combined(self.branches, self.num_samples, self.guidance_scale)


class Decoder(Protocol):
    """Decodes latents to pictures, and encodes pictures."""

    @property
    def vae(self) -> nn.Module: ...

    @property
    def tiny(self) -> nn.Module | None:
        """A cheaper decoder for previews; None unless the recipe asks for one."""
        ...

    @property
    def side(self) -> int:
        """Pixels of a picture's side for each of a latent's."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, h, w) float32 clean latents of images (B, 3, H, W) in [0, 1]."""
        ...

    def at_work(self) -> AbstractContextManager[None]:
        """A context in which an offloaded decoder is on the device."""
        ...


class Weights(Protocol):
    """The trained weights: float32 masters, which the optimizer changes, and the copies with which the network computes."""

    @property
    def masters(self) -> list[nn.Parameter]: ...

    def gather(self) -> None:
        """Add the copies' gradients to the masters'."""
        ...

    def forget(self) -> None:
        """Drop the copies' gradients."""
        ...

    def refresh(self) -> None:
        """Set the copies to the masters' values."""
        ...


class Policy(Protocol):
    """A diffusion model as a forward policy P_F, with an adapter that is trained."""

    schedule: Schedule
    latent_shape: tuple[int, int, int]
    """(C, H, W)."""
    dtype: torch.dtype
    """Precision in which the denoiser computes."""

    @property
    def denoiser(self) -> nn.Module:
        """The network with its adapter."""
        ...

    @property
    def decoder(self) -> Decoder: ...

    @property
    def weights(self) -> Weights: ...

    @property
    def text_shape(self) -> tuple[int, int]:
        """(S, D) of a prompt's embedding."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, S, D) embeddings of prompts, on the CPU. The policy keeps the empty prompt's for guidance.

        If its text encoders are trained, these are rows (P, S, E) of tokens in place of embeddings: only the policy reads them.
        """
        ...

    def pretrained_text(self, rows: Tensor) -> Tensor:
        """(P, S, D) embeddings, on the CPU, by the pretrained text encoders of what `encode` returned."""
        ...

    def blank_prompt(self) -> Tensor:
        """What `encode` returns for one prompt, with unknown content, and the same for the empty one; for forecasts on the meta
        device."""
        ...

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """One sentence for each part of the prompts that the text encoder cannot read."""
        ...

    def free_text_encoder(self) -> None:
        """Drop the text encoders from memory, unless they are trained; call it when all prompts are encoded."""
        ...

    def predict(
        self, x_t: Tensor, t: Tensor, text: Tensor, *, pretrained: bool = False, unguided: bool = False
    ) -> Prediction:
        """The network's outputs at B states.

        Args:
            x_t:        (B, C, H, W).
            t:          (B,) timesteps of the schedule.
            text:       (B, S, D) prompts as `encode` returned them.
            pretrained: switch the adapter off.
            unguided:   leave the unconditional branch out.
        """
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1]."""
        ...

    def preview(self, x0_hat: Tensor, decoder: str | None = None) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1] of predicted latents, for forward-looking rewards.

        Args:
            decoder: a value of `forward_looking.decoder`, which may be cheaper than `decode`; None takes the recipe's.
        """
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The networks that stay in memory through training: denoiser, decoders, and text encoders that are trained."""
        ...

    def trained_encoders(self) -> list[nn.Module]:
        """The text encoders that are trained."""
        ...

    def base_weights(self) -> dict[str, list[Tensor]]:
        """The weights that were loaded, before any training, by the name that error messages give their network."""
        ...

    def trainable(self) -> list[nn.Parameter]:
        """The parameters for the optimizer: `weights.masters`."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name, float32 on the CPU."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set the trained weights. Raises RunError if they do not fit this adapter exactly."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained weights in the formats that other programs load."""
        ...

    def describe(self) -> dict[str, Any]:
        """The description of the model in run.json."""
        ...
