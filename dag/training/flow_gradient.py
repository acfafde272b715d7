"""The gradient of the forward-looking log flow at the state that a transition leads to.

    y = d/dx [beta w_k r(x0_hat(x)) + log F~(x)],        at x_0 itself: beta d r / d x_0

The reward's part goes backwards through the reward and the decoder, or through the critic that has learnt the reward, to x0_hat,
and from there through the denoiser to x.

Legend: B samples, T transitions.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dag.chain.jacobian import backwards
from dag.chain.policy import Policy, Prediction
from dag.chain.rollout import Score, last_latents
from dag.objectives.log_scale import LogScale
from dag.recipe import Balance, Recipe
from dag.training.critic_fit import CriticFit
from dag.training.embeddings import Embeddings
from dag.training.flow_fit import FlowFit


@dataclass(frozen=True)
class Rewarded:
    """B trajectories of a batch, and what rewards them."""

    prompt_id: Tensor
    """(B,) int64 on the CPU."""
    score: Score | None
    """Scores and differentiates the rewards of the batch's trajectories; None if nothing asks for it."""
    rows: Tensor
    """(B,) int64 on the CPU, which of the batch's trajectories these are."""
    epoch: int
    """Decides beta."""


@dataclass(frozen=True)
class Look:
    """The forward-looking flow at B states as the policy's update uses it."""

    y: Tensor
    """(B, C, H, W) float32 d log F / d x."""
    log_looking: Tensor
    """(B,) forward-looking term, with the critic's value where the reward is learnt; of a final latent its log reward."""


class FlowGradient:
    """Differentiates log F at states of a policy's chain.

    Args:
        flow_fit:   the state flow; None for objectives without one.
        critic_fit: the reward critic; None if all rewards have a gradient.
        text:       embeddings of the recipe's prompts.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        flow_fit: FlowFit | None,
        critic_fit: CriticFit | None,
        text: Embeddings,
        log_scale: LogScale,
    ) -> None:
        assert isinstance(recipe.objective, Balance)
        self.section, self.policy, self.schedule = recipe.objective, policy, policy.schedule
        self.flow_fit, self.critic_fit, self.text, self.log_scale = flow_fit, critic_fit, text, log_scale
        self.has_exact = any(recipe.exact_rewards)

    def at(self, x: Tensor, k: int, whose: Rewarded) -> Look:
        """The flow's gradient at stored states.

        Args:
            x: (B, C, H, W) states before step k, or final latents (k = T).
        """
        text = self.text.rows(whose.prompt_id)
        with torch.enable_grad():
            x = x.detach().float().requires_grad_(True)
            if k == self.schedule.num_transitions:
                clean = last_latents(self.policy, x, text)
            else:
                t, is_pretrained = self.schedule.timesteps[k].expand(len(x)), self.section.jacobian == "pretrained"
                with torch.set_grad_enabled(self.section.jacobian != "none"):
                    prediction = self.policy.predict(x, t, text, pretrained=is_pretrained)
                    clean = self.schedule.x0_hat(x, prediction.guided, k)
        return self._look(x, clean, k, whose, keeps_graph=False)

    def through(
        self, x: Tensor, prediction: Prediction, k: int, whose: Rewarded, *, keeps_graph: bool, has_flow: bool = True
    ) -> Look:
        """The flow's gradient at states whose prediction is known already. Arguments as for `at`.

        Args:
            x:           (B, C, H, W) states that require a gradient, unless the Jacobian is left out.
            prediction:  at x, with its graph.
            keeps_graph: the graph is needed again.
            has_flow:    add the gradient of log F~, if there is a learnt flow.
        """
        if self.section.jacobian == "pretrained":
            return self.at(x, k, whose)
        with torch.enable_grad():
            clean = self.schedule.x0_hat(x.float(), prediction.guided, k)
        return self._look(x, clean, k, whose, keeps_graph=keeps_graph, has_flow=has_flow)

    def _look(
        self, x: Tensor, clean: Tensor, k: int, whose: Rewarded, *, keeps_graph: bool, has_flow: bool = True
    ) -> Look:
        """The flow's gradient at x, by way of the clean latents that the policy predicts from it."""
        is_final = k == self.schedule.num_transitions
        reward, gradient = self._reward(clean.detach(), whose, is_preview=not is_final)
        with torch.no_grad():
            vector = self.log_scale.slope(whose.epoch, k) * gradient
            log_F = self.log_scale.log_reward if is_final else partial(self.log_scale.log_looking, k=k)
            log_looking = log_F(reward, whose.epoch)
        if clean is x:
            return Look(vector, log_looking)
        if clean.grad_fn is not None and (is_final or self.section.jacobian != "none"):
            y = backwards(clean, x, vector, keeps_graph=keeps_graph)
        else:
            y = self.schedule.shrinkage[k] * vector
        if has_flow and self.flow_fit is not None and not is_final:
            y = y + self.of_flow(x, k, whose.prompt_id)
        return Look(y, log_looking)

    def _reward(self, latents: Tensor, whose: Rewarded, *, is_preview: bool) -> tuple[Tensor, Tensor]:
        """(rewards (B,), gradients (B, C, H, W)) at clean latents: exact ones and learnt ones add."""
        reward, gradient = torch.zeros(len(latents), device=latents.device), torch.zeros_like(latents)
        if self.has_exact:
            assert whose.score is not None
            reward, gradient = whose.score.gradient(latents, whose.rows, is_preview=is_preview)
        if self.critic_fit is not None:
            learnt, its_gradient = self.critic_fit.value_and_gradient(latents, whose.prompt_id)
            reward, gradient = reward + learnt, gradient + its_gradient
        return reward, gradient

    def of_flow(self, x: Tensor, k: int, prompt_id: Tensor, *, is_trained: bool = False) -> Tensor:
        """(B, C, H, W) d log F~ / d x at step k; with `is_trained` its own gradient reaches the flow's weights."""
        assert self.flow_fit is not None
        ks = torch.full((len(x),), k, device=x.device)
        with torch.enable_grad():
            x = x.detach().float().requires_grad_(True)
            log_F = self.flow_fit.log_F_tilde_at(x, prompt_id, ks).sum()
            (gradient,) = torch.autograd.grad(log_F, x, create_graph=is_trained)
        return gradient
