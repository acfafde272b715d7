"""Prompt embeddings: those in use are moved to the device once."""

import torch

from dag.costs.fake_gpu import FakeGpu
from dag.costs.live_bytes import as_on_cuda
from dag.training.embeddings import Embeddings

PROMPT_ID = torch.tensor([3, 1, 3])


def test_rows_are_the_prompts() -> None:
    text = torch.randn(5, 4, 2)
    embeddings = Embeddings(text, torch.device("cpu"))
    for prompt_id in (PROMPT_ID, torch.tensor([0]), PROMPT_ID):
        assert torch.equal(embeddings.rows(prompt_id), text[prompt_id])


def test_a_micro_batch_costs_one_copy() -> None:
    embeddings = Embeddings(torch.zeros(5, 4, 2), torch.device("meta"))
    with FakeGpu() as counted, as_on_cuda():
        for _ in range(10):
            embeddings.rows(PROMPT_ID.clone())
        assert counted.counts.host_copies.total() == 1
        embeddings.rows(PROMPT_ID[:2])
        assert counted.counts.host_copies.total() == 2
