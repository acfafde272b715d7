"""DDPO with importance sampling (Black et al. 2024): the reinforcement-learning baseline on the same transitions."""

from collections import defaultdict, deque
from typing import Any

import torch
from dag_kernels import PLAIN, Kernels
from torch import Tensor

from dag.objectives.registry import OBJECTIVES, BatchFree, ObjectiveOutput, clipped_surrogate, log_ratio
from dag.objectives.transition import Transition
from dag.recipe import PolicyGradient as Config

_tiny = 1e-6


@OBJECTIVES.register("ddpo")
class PolicyGradient(BatchFree):
    """loss = max(-A ratio, -A clip(ratio)), where the advantage A is the reward normalised over the epoch or per prompt."""

    uses_flow = False

    def __init__(self, config: Config, kernels: Kernels = PLAIN) -> None:
        self.config = config  # `kernels` compute the balance of a flow, and here is none
        self.history: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=config.per_prompt))

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor:
        """(N,) advantages: the rollout's rewards, normalised and clipped. With `per_prompt` the rewards are remembered."""
        advantage = (reward - reward.mean()) / (reward.std(correction=0) + _tiny)
        if self.config.per_prompt is not None:
            values = list(zip(prompt_id.tolist(), reward.tolist(), strict=True))
            for prompt, value in values:
                self.history[prompt].append(value)
            for row, (prompt, value) in enumerate(values):
                seen = torch.tensor(list(self.history[prompt]))
                if 2 * len(seen) >= self.config.per_prompt:
                    advantage[row] = (value - seen.mean()) / (seen.std(correction=0) + _tiny)
        return advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        assert transition.advantage is not None
        loss, clipped = clipped_surrogate(transition.advantage, log_ratio(transition), self.config.clip_range)
        if transition.policy_weight is not None:
            loss = transition.policy_weight * loss
        return ObjectiveOutput(loss=loss, ratio=log_ratio(transition).detach().exp(), clipped=clipped)

    def state_dict(self) -> dict[str, Any]:
        return {"history": {str(prompt): list(values) for prompt, values in self.history.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.clear()
        for prompt, values in state["history"].items():
            self.history[int(prompt)].extend(values)
