"""Prompt embeddings: all of them in CPU memory, those in use on the device."""

import torch
from torch import Tensor


class Embeddings:
    """Rows of (P, S, D) prompt embeddings, moved to the device when other prompts are asked for than before.

    A micro-batch asks for the same prompts in every transition and for policy and flow alike: one copy serves them all.

    Args:
        text: (P, S, D) on the CPU.
    """

    def __init__(self, text: Tensor, device: torch.device) -> None:
        self.text, self.device = text, device
        self._prompt_id, self._rows = torch.empty(0, dtype=torch.int64), text[:0].to(device)

    def rows(self, prompt_id: Tensor) -> Tensor:
        """(B, S, D) on the device of prompts (B,), which are on the CPU."""
        if not torch.equal(prompt_id, self._prompt_id):
            self._prompt_id, self._rows = prompt_id, self.text[prompt_id].to(self.device)
        return self._rows
