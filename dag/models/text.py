"""Text encoders of a diffusers folder: loaded when they are first needed, and freed once all prompts are embedded.

Legend: P texts, S text tokens, D width.
"""

import gc
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from dag.models.source import component_folder, is_architecture, read_config
from dag.models.weights import load_text_encoder, load_tokenizer

# Tokens of a prompt if the text encoder's config does not say; transformers' own default.
_CLIP_TOKENS = 77
# A vocabulary of fewer tokens is a closed list of words: a word outside it is split into letters.
_OPEN_VOCABULARY = 10_000
_ORDINALS = ("", "second ", "third ")


class TextEncoder:
    """A tokenizer and its text encoder.

    Args:
        folder:    the model's folder.
        index:     0 for `text_encoder`, 1 for `text_encoder_2`, and so on.
        component: transformers' class of the encoder.
        dtype:     precision in which it computes.
        device:    where it computes. A T5 stays in CPU memory and passes through a GPU layer by layer: it can be larger than
                   what the denoiser beside it leaves free.
        tokens:    S; None takes the encoder's own.
    """

    def __init__(
        self,
        folder: Path,
        index: int,
        component: Any,
        dtype: torch.dtype,
        device: torch.device,
        variant: str | None = None,
        tokens: int | None = None,
    ) -> None:
        suffix = f"_{index + 1}" if index else ""
        self.folder, self.component, self.dtype, self.device, self.variant = folder, component, dtype, device, variant
        self.name, self.encoder_folder, self.tokenizer_folder = (
            f"{_ORDINALS[index]}text encoder",
            f"text_encoder{suffix}",
            f"tokenizer{suffix}",
        )
        self._tokens = tokens
        self.module: Any = None
        """The encoder's network; None until it is needed, and once it is freed."""

    @property
    def tokens(self) -> int:
        """S, the tokens that a text is padded or cut to."""
        if self._tokens is not None:
            return self._tokens
        return int(read_config(self.folder, self.encoder_folder).get("max_position_embeddings", _CLIP_TOKENS))

    @property
    def is_absent(self) -> bool:
        """Whether the model goes without this encoder, as Stable Diffusion 3 may without its T5.

        A folder of configs alone counts as without a T5, whose random weights would fill the memory of a benchmark.
        """
        is_unneeded = is_architecture(self.folder) and self.component is T5EncoderModel
        return is_unneeded or not component_folder(self.folder, self.encoder_folder).is_dir()

    def free(self) -> None:
        self.module = None
        # The hooks that bring a T5's layers to the GPU hold each other, so that counting references alone does not free it.
        gc.collect()

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(P, S) int64 tokens of texts, padded or cut; (P, 0) of an absent T5."""
        if self.component is T5EncoderModel and self.is_absent:
            return torch.zeros(len(texts), 0, dtype=torch.int64)
        padded = {"padding": "max_length", "max_length": self.tokens, "truncation": True}
        return self.tokenizer(list(texts), **padded, return_tensors="pt").input_ids

    def __call__(self, ids: Tensor, *, has_hidden: bool = False) -> Any:
        """The encoder's output at tokens (P, S), as transformers returns it, in the network's dtype.

        Args:
            has_hidden: return the hidden states of all layers too: memory for each layer.
        """
        return self.load()(ids.to(self.device), output_hidden_states=has_hidden)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """One sentence for each prompt that is too long, and for each with words outside a closed vocabulary."""
        tokenizer = self.tokenizer
        room = self.tokens - tokenizer.num_special_tokens_to_add()
        found = []
        for prompt in prompts:
            if len(tokenizer.tokenize(prompt)) > room:
                found.append(f"prompt {prompt!r} is longer than the text encoder's {room} tokens and is cut")
            unknown = [word for word in re.findall(r"[a-z]+", prompt.lower()) if len(tokenizer.tokenize(word)) > 1]
            if unknown and len(tokenizer) < _OPEN_VOCABULARY:
                found.append(f"prompt {prompt!r}: this model does not know {', '.join(map(repr, unknown))}")
        return found

    @cached_property
    def tokenizer(self) -> Any:
        kind = T5TokenizerFast if self.component is T5EncoderModel else CLIPTokenizer
        return load_tokenizer(self.folder, self.tokenizer_folder, kind)

    def load(self) -> Any:
        """The encoder's network, loaded if it is not yet."""
        if self.module is None:
            is_streamed = self.component is T5EncoderModel and self.device.type == "cuda"
            place = torch.device("cpu") if is_streamed else self.device
            self.module = load_text_encoder(
                self.folder, self.dtype, place, self.variant, self.encoder_folder, self.component
            )
            if is_streamed:
                apply_group_offloading(self.module, self.device, offload_type="leaf_level")
        return self.module


def hidden_and_pooled(output: Any) -> tuple[Tensor, Tensor]:
    """(last hidden states but one (P, S, D), first output, which of an encoder with a projection is the pooled embedding)."""
    return output.hidden_states[-2], output[0]


def widened(rows: Tensor, width: int) -> Tensor:
    """Rows (P, S, D) with zeros after them, (P, S, width)."""
    return functional.pad(rows, (0, width - rows.shape[2]))
