"""The fixed evaluation of a run: the same prompts and seeds before, during and after training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.chain.policy import Policy
from dag.chain.rollout import generate
from dag.chain.sample_ids import FIXED_EVALUATION
from dag.errors import UsageError
from dag.evaluation.distances import within_prompt_diversity
from dag.evaluation.judge import expected, load_judge, noun_accuracy
from dag.recipe import Recipe
from dag.rewards import RewardSum
from dag.rewards.clip import feature_tower
from dag.run.processes import ALONE, Processes


@dataclass(frozen=True)
class EvaluationResult:
    """The N pictures of one fixed evaluation, and what was measured on them."""

    images: Tensor
    """(N, 3, H, W) float32 in [0, 1], image i of prompt i // images_per_prompt."""
    prompts: list[str]
    """(N,) the prompt of each image."""
    reward: Tensor
    """(N,) float32, the weighted sum of the recipe's rewards."""
    metrics: dict[str, float]
    """What was measured, by key of metrics.jsonl."""


class Evaluator:
    """Draws and measures the fixed evaluation; built once per run, since it holds networks.

    Args:
        prompts: P prompts, of which the recipe's `evaluation.prompts` says how many are used, from the first.
        text:    (P, S, D) the embeddings of these prompts.

    Raises:
        UsageError: `evaluation.fidelity` is on, and the judge does not know the thing in a prompt.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: Sequence[str],
        text: Tensor,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        config = recipe.evaluation
        self.recipe, self.per_prompt = recipe, config.images_per_prompt
        index = torch.arange(min(config.prompts, len(prompts))).repeat_interleave(self.per_prompt)
        self.prompts, self.text = [prompts[i] for i in index.tolist()], text[index]
        self.sample_id = FIXED_EVALUATION + torch.arange(len(index))
        self.tower = feature_tower("evaluation.diversity", config.diversity, device) if config.diversity else None
        self.judge = load_judge() if config.fidelity else None
        unknown = [prompt for prompt in self.prompts if self.judge is not None and expected(prompt) is None]
        if unknown:
            raise UsageError(
                f"evaluation.fidelity: the judge knows no single thing in the prompt {unknown[0]!r}; use false"
            )

    def tiles(self, size: int) -> list[Tensor]:
        """This process's share of the pictures as row indices, at most `size` in each tile; all shares are equally large."""
        return list(self.processes.mine(self._padded()).split(size))

    def draw(self, policy: Policy, rows: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) of these rows, on the CPU."""
        ids, sampler = self.sample_id[rows], self.recipe.sampler
        return generate(policy, self.text[rows], ids, self.recipe.seed, sampler, tile=len(rows))

    def together(self, images: Tensor) -> Tensor:
        """All pictures (N, 3, H, W), in every process, gathered from each process's share (n, 3, H, W)."""
        return self.processes.everyones(images)[: len(self.prompts)]

    def _padded(self) -> Tensor:
        """Indices of all rows, the last one repeated until they divide evenly among the processes."""
        count, size = len(self.prompts), self.processes.size
        return torch.arange(-(-count // size) * size).clamp(max=count - 1)

    def measure(self, images: Tensor, reward: RewardSum) -> EvaluationResult:
        """Reward, diversity and noun_top1 of the pictures (N, 3, H, W)."""
        values, parts = reward.detailed(images, self.prompts, self.sample_id.tolist())
        metrics = {
            "eval_reward_mean": float(values.mean()),
            "eval_reward_std": float(values.std(correction=0)),
        }
        if len(parts) > 1:
            metrics |= {f"eval_reward_{name}": float(part.mean()) for name, part in parts.items()}
        if self.tower is not None:
            metrics["diversity"] = within_prompt_diversity(self.tower.embed_images(images).cpu(), self.per_prompt)
        if self.judge is not None:
            metrics["noun_top1"], metrics["noun_top5"] = noun_accuracy(self.judge, images, self.prompts)
        return EvaluationResult(images, self.prompts, values, metrics)
