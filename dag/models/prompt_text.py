"""What conditions the denoiser on a prompt: embeddings that are computed once, or text encoders that are trained.

Outside this file a prompt is a row that only the model reads: its embedding, or the tokens from which a trained text encoder
computes the embedding anew whenever its LoRA factors have changed (TexForce; Chen et al. 2024). So gradients reach the factors,
and nothing outside has to know. Embedding a prompt costs far less than the denoiser's pass that it conditions.

Legend: B samples, P prompts, S rows of an embedding, D their width, E text encoders.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dag.models.adapter import TrainedWeights, add_lora
from dag.models.text import TextEncoder
from dag.recipe import TextAdapter

# Tokens in one call of the text encoders: 64 texts of CLIP's length.
_AT_ONCE = 64 * 77
# The projections of attention, the layers that TexForce trains.
_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class FixedText:
    """Embeds prompts once.

    Args:
        encoders: the model's text encoders.
        embed:    maps tokens (P, S) of each encoder to embeddings (P, S, D) on the device.
        empty_of: maps the empty prompt's embedding (1, S, D) to what takes the place of a prompt without guidance.
        device:   the denoiser's.
        dtype:    the denoiser's.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        embed: Callable[[Sequence[Tensor]], Tensor],
        empty_of: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.encoders, self.embed, self.empty_of, self.device, self.dtype = encoders, embed, empty_of, device, dtype
        self.empty: Tensor | None = None
        """(1, S, D) the empty prompt's embedding; None before the first call of `encode`."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(P, S, D) the prompts' rows, on the CPU; the empty prompt is kept."""
        embedded = self._all([encoder.ids(["", *prompts]) for encoder in self.encoders])
        self.empty = self.empty_of(embedded[:1]).to(self.device)
        return embedded[1:]

    def blank(self, shape: tuple[int, int]) -> Tensor:
        """(1, S, D) a row of unknown content, on the CPU; the same is kept for the empty prompt.

        Args:
            shape: (S, D) of an embedding.
        """
        self.empty = torch.empty(1, *shape, dtype=self.dtype, device=self.device)
        return torch.zeros(1, *shape, dtype=self.dtype)

    def conditions(self, rows: Tensor, *, pretrained: bool) -> tuple[Tensor, Tensor]:
        """(embeddings (B, S, D) of rows, that of the empty prompt (1, S, D)), on the device.

        Args:
            pretrained: those of the pretrained text encoders.
        """
        if self.empty is None:
            raise RuntimeError("encode() must come before predict(): it embeds the empty prompt")
        return rows.to(self.device, self.dtype), self.empty

    def pretrained(self, rows: Tensor) -> Tensor:
        """(P, S, D) embeddings of rows by the pretrained text encoders, on the CPU."""
        return rows

    def free(self) -> None:
        """Drop the text encoders from memory, if they are not trained."""
        for encoder in self.encoders:
            encoder.free()

    def networks(self) -> dict[str, nn.Module]:
        """The text encoders that are trained, by what their weights' names begin with."""
        return {}

    @torch.no_grad()
    def _all(self, ids: Sequence[Tensor]) -> Tensor:
        """(P, S, D) embeddings at tokens (P, S), on the CPU. A few at a time: together they would fill the device."""
        at_once = max(1, _AT_ONCE // max(column.shape[1] for column in ids))
        parts = zip(*(column.split(at_once) for column in ids), strict=True)
        return torch.cat([_on_cpu(self.embed(part)) for part in parts])


class TrainedText(FixedText):
    """Embeds prompts by text encoders with LoRA factors. Their rows are tokens (P, S, E).

    The empty prompt of guidance goes through the trained encoders too, as in a pipeline that loads the LoRA.

    Args:
        adapter: rank and scale of the factors.
        seed:    decides their initial values.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        embed: Callable[[Sequence[Tensor]], Tensor],
        empty_of: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: torch.dtype,
        adapter: TextAdapter,
        seed: int,
    ) -> None:
        super().__init__(encoders, embed, empty_of, device, dtype)
        for encoder in encoders:
            add_lora(encoder.load(), adapter.rank, adapter.alpha, _TARGETS, seed)
            encoder.module.eval()
        self.weights: TrainedWeights | None = None
        """The trained weights, whose changes are followed; set once they are known."""
        # The embeddings last asked for without gradients: a rollout asks for the same prompts in each step.
        self._last: dict[bool, tuple[Tensor, int, tuple[Tensor, Tensor]]] = {}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        rows = torch.stack([encoder.ids(["", *prompts]) for encoder in self.encoders], dim=2)
        self.empty = rows[:1].to(self.device)
        return rows[1:]

    def blank(self, shape: tuple[int, int]) -> Tensor:
        self.empty = torch.zeros(1, self.encoders[0].tokens, len(self.encoders), dtype=torch.int64, device=self.device)
        return torch.zeros(self.empty.shape, dtype=torch.int64)

    def conditions(self, rows: Tensor, *, pretrained: bool) -> tuple[Tensor, Tensor]:
        assert self.weights is not None
        if torch.is_grad_enabled() and not pretrained:
            return self._now(rows)
        last = self._last.get(pretrained)
        if last is None or last[0] is not rows or last[1] != self.weights.changes:
            with torch.no_grad(), self.weights.switched(off=pretrained):
                last = self._last[pretrained] = rows, self.weights.changes, self._now(rows)
        return last[2]

    def pretrained(self, rows: Tensor) -> Tensor:
        assert self.weights is not None
        with self.weights.switched(off=True):
            return self._all(rows.unbind(2))

    def free(self) -> None:
        pass

    def networks(self) -> dict[str, nn.Module]:
        return {f"{encoder.encoder_folder}.": encoder.module for encoder in self.encoders}

    def _now(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.empty is not None
        embedded = self.embed(torch.cat([self.empty, rows.to(self.device)]).unbind(2))
        return embedded[1:], self.empty_of(embedded[:1])


def _on_cpu(embedded: Tensor) -> Tensor:
    """A tensor on the CPU; of one without content, as forecasts have, its shape."""
    return torch.zeros(embedded.shape, dtype=embedded.dtype) if embedded.is_meta else embedded.cpu()


def names_in_files(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's factors by the names that all programs know; recent versions of transformers leave out the first part."""
    return {name if name.startswith("text_model.") else f"text_model.{name}": tensor for name, tensor in state.items()}
