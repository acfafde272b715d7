"""Prompt embeddings: all are in CPU memory, and those in use also on the device."""

import torch
from torch import Tensor


class Embeddings:
    """The embeddings of P prompts. The rows last asked for stay on the device.

    In every transition of a micro-batch, policy and flow ask for the same prompts: one copy to the device serves them all.

    Args:
        text: (P, S, D) on the CPU.
    """

    def __init__(self, text: Tensor, device: torch.device) -> None:
        self.text, self.device = text, device
        self._prompt_id, self._rows = torch.empty(0, dtype=torch.int64), text[:0].to(device)

    def rows(self, prompt_id: Tensor) -> Tensor:
        """(B, S, D) embeddings on the device. `prompt_id` (B,) is on the CPU."""
        if not torch.equal(prompt_id, self._prompt_id):
            self._prompt_id, self._rows = prompt_id, self.text[prompt_id].to(self.device)
        return self._rows
