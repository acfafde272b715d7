"""What a model family offers: a diffusion model as a forward policy P_F. One class a family, in `dag.models`.

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
    """(2B, C, H, W) unconditional, then conditional outputs, or (B, C, H, W) where there is nothing to combine; in the
    network's dtype."""
    num_samples: int
    """B"""
    guidance_scale: float
    conditional: Tensor
    """(B, C, H, W) the conditional branch alone; equal to `guided` without guidance."""

    @cached_property
    def guided(self) -> Tensor:
        """(B, C, H, W) float32 after classifier-free guidance: the policy's own output."""
        return combined(self.branches, self.num_samples, self.guidance_scale)


class Decoder(Protocol):
    """From latents to pictures."""

    @property
    def vae(self) -> nn.Module: ...

    @property
    def tiny(self) -> nn.Module | None:
        """A cheaper decoder for previews, if the recipe asks for one."""
        ...

    def at_work(self) -> AbstractContextManager[None]:
        """Inside, a decoder that is offloaded is on the device."""
        ...


class Weights(Protocol):
    """The trained weights: float32 masters, and the copies that the network computes with."""

    @property
    def masters(self) -> list[nn.Parameter]: ...

    def gather(self) -> None:
        """Add the copies' gradients to the masters'."""
        ...

    def forget(self) -> None:
        """Drop the copies' gradients."""
        ...

    def refresh(self) -> None:
        """Bring the copies up to date with the masters."""
        ...


class Policy(Protocol):
    """A diffusion model as a forward policy P_F, with an adapter that is trained."""

    schedule: Schedule
    latent_shape: tuple[int, int, int]
    dtype: torch.dtype
    """What the denoiser computes in."""

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
        """(P, S, D) embeddings of prompts, on the CPU; the empty prompt's is kept for guidance."""
        ...

    def blank_prompt(self) -> None:
        """Stand in for `encode` where nothing is computed: an empty prompt's embedding without values."""
        ...

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """What the text encoder will not see of the prompts, in words."""
        ...

    def free_text_encoder(self) -> None:
        """Drop the text encoder from memory; all prompts are encoded."""
        ...

    def predict(
        self, x_t: Tensor, t: Tensor, text: Tensor, *, pretrained: bool = False, unguided: bool = False
    ) -> Prediction:
        """Outputs at x_t (B, C, H, W), t (B,), text (B, S, D).

        `pretrained` switches the adapter off; `unguided` leaves the unconditional branch out.
        """
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1]."""
        ...

    def preview(self, x0_hat: Tensor, decoder: str | None = None) -> Tensor:
        """(B, 3, H, W) float32 images in [0, 1] of predicted latents, for forward-looking rewards; perhaps cheaper.

        `decoder` is one of `forward_looking.decoder`; None takes the recipe's.
        """
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The networks that stay in memory through training: denoiser and decoders."""
        ...

    def base_weights(self) -> dict[str, list[Tensor]]:
        """What was loaded, before any training, by the network's name in an error message."""
        ...

    def trainable(self) -> list[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Trainable weights by name, on the CPU."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RunError if the weights do not fit this adapter exactly."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained weights in the formats that other programs load."""
        ...

    def describe(self) -> dict[str, Any]:
        """What run.json says of the model."""
        ...
