"""DDPO with importance sampling (Black et al. 2024): the reinforcement-learning baseline on the same transitions.

With groups (`prompts.per_group`) it is GRPO as Flow-GRPO and DanceGRPO use it: rewards are compared within their group. With
`baseline: value` it is DPOK (Fan et al. 2023): a reward is compared with what the critic V expected of it at each state.
"""

from collections import defaultdict, deque
from typing import Any

import torch
from dag_kernels import PLAIN, Kernels
from torch import Tensor

from dag.objectives.groups import grouped, ungrouped
from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, UpdateScalars, surrogate_output
from dag.objectives.transition import Transition
from dag.recipe import PolicyGradient as Config


@OBJECTIVES.register("ddpo")
class PolicyGradient(Plain[Config]):
    """loss = max(-A ratio, -A clip(ratio)), where the advantage A is the reward normalised over the epoch, per group or per
    prompt, or r(x_0) - V(x_k)."""

    def __init__(self, config: Config, kernels: Kernels = PLAIN, per_group: int = 1) -> None:
        super().__init__(config, kernels, per_group)
        self.history: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=config.per_prompt))

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor | None:
        """(N,) advantages: the rollout's rewards, normalised and clipped. With `per_prompt` the rewards are remembered."""
        if self.config.baseline == "value":
            return None
        advantage = self._normalised(reward)
        if self.config.per_prompt is not None:
            values = list(zip(prompt_id.tolist(), reward.tolist(), strict=True))
            for prompt, value in values:
                self.history[prompt].append(value)
            for row, (prompt, value) in enumerate(values):
                seen = torch.tensor(list(self.history[prompt]))
                if 2 * len(seen) >= self.config.per_prompt:
                    advantage[row] = (value - seen.mean()) / (seen.std(correction=0) + self.config.std_floor)
        return advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def advantages(self, update: UpdateScalars) -> Tensor | None:
        """(N, T) what the reward is above the critic's expectation at each state, divided by the sd of the update's rewards."""
        if self.config.baseline != "value":
            return None
        assert update.reward is not None and update.values is not None
        gain = update.reward[:, None] - update.values
        if self.config.std == "all":
            gain = gain / (update.reward.std(correction=0) + self.config.std_floor)
        return gain.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def _normalised(self, reward: Tensor) -> Tensor:
        """(N,) rewards minus the mean of their group, divided as the recipe says."""
        columns = grouped(reward, self.per_group)
        gain = ungrouped(columns - columns.mean(0))
        if self.config.std == "none":
            return gain
        in_group = ungrouped(columns.std(0, correction=0).expand_as(columns))
        sd = in_group if self.config.std == "group" else reward.std(correction=0)
        return gain / (sd + self.config.std_floor)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        return surrogate_output(transition, self.config.clip_range)

    def state_dict(self) -> dict[str, Any]:
        return {"history": {str(prompt): list(values) for prompt, values in self.history.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.clear()
        for prompt, values in state["history"].items():
            self.history[int(prompt)].extend(values)
