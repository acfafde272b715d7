"""Noise prediction on pictures of the rollout that are noised anew, for objectives that weigh or compare pictures by their reward.

    m(x_0) = mean over the latent of |o_theta(x_k) - o*|^2,    x_k = a_k x_0 + s_k epsilon

with o* the output that predicts this noise exactly, k one of the sampler's own noise levels, and the conditional branch alone.

    regression   n w_n m(x_0^n)                                                                  (RAFT, reward-weighted regression)
    dpo          -log sigmoid(-strength / 2 [(m_w - m_w,reference) - (m_l - m_l,reference)])     (Wallace et al. 2024)

The reference of a preference is the pretrained model, or an earlier policy of the run (`reference: past`). With `flip: anchor` the
minus between the brackets is a plus where m_w > m_w,reference (SePPO; Zhang et al. 2024).

Only x_0 is needed of a trajectory, so any sampler could have drawn it, or a painter: replayed and given pictures have this loss
too. Level and noise depend on the group, the update and the number of the draw alone; the pictures of a group share them.

Legend: B pictures of a micro-batch, K of a group.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dag.chain.policy import Policy
from dag.chain.rollout import last_latents
from dag.chain.sample_ids import first_of_group
from dag.chain.trajectory import Rows, draw_noise_anew
from dag.errors import RunError
from dag.objectives import ObjectiveOutput
from dag.recipe import DirectPreference, Recipe, Regression
from dag.training.loss import Loss, Rollout, StepOutput, Tables
from dag.training.past import PastPolicies


class Denoising:
    """Computes the losses of a recipe's objective, one with `form: denoise`.

    Args:
        past: the references of `reference: past`; None for others.
    """

    is_sweep = False

    def __init__(self, recipe: Recipe, policy: Policy, loss: Loss, past: PastPolicies | None = None) -> None:
        assert isinstance(recipe.objective, DirectPreference | Regression)
        self.recipe, self.section, self.loss, self.past = recipe, recipe.objective, loss, past
        self.policy, self.schedule, self.per_group = policy, policy.schedule, recipe.prompts.per_group

    def steps(
        self, rollout: Rollout, rows: Rows, chosen: Sequence[tuple[int, float]], tables: Tables, update: int
    ) -> Iterator[StepOutput]:
        """The draws, whose numbers are in the place of steps; the advantages say which pictures to imitate. See `Losses`."""
        assert tables.advantage is not None
        advantage = tables.advantage[rows, 0]
        for number, weight in chosen:
            if isinstance(self.section, Regression):
                loss = (1 + advantage) * self._error(rollout, rows, update, number)
            else:
                loss = self._preference(rollout, rows, advantage.sign(), update, number)
            zero = torch.zeros_like(loss.detach())
            yield StepOutput(number, weight, ObjectiveOutput(loss=loss, ratio=zero + 1), zero)

    def _preference(self, rollout: Rollout, rows: Rows, sign: Tensor, update: int, number: int) -> Tensor:
        """(B,) the loss of each group, at its preferred picture; zero for the others and for groups without a preference."""
        assert isinstance(self.section, DirectPreference)
        if len(sign) % self.per_group:
            raise RunError(
                f"micro-batch {len(sign)} is smaller than a group; set prompts.per_group or train.micro_batch"
            )
        reference = self._reference(rollout, rows, update, number)
        worse = sign * (self._error(rollout, rows, update, number) - reference)
        if self.section.flip == "anchor":
            anchor = self._of_group(worse.detach() * (sign > 0))
            worse = torch.where((sign < 0) & (anchor > 0), -worse, worse)
        margin = self._of_group(worse)
        return (sign > 0) * -functional.logsigmoid(-0.5 * self.section.strength * margin)

    def _of_group(self, values: Tensor) -> Tensor:
        """(B,) the sum over the group of each."""
        return values.view(-1, self.per_group).sum(1).repeat_interleave(self.per_group)

    @torch.no_grad()
    def _reference(self, rollout: Rollout, rows: Rows, update: int, number: int) -> Tensor:
        """(B,) m of the reference."""
        if self.past is None:
            return self._error(rollout, rows, update, number, pretrained=True)
        with self.past.one_of(self.recipe.seed * 1_000_003 + update):
            return self._error(rollout, rows, update, number)

    def _error(self, rollout: Rollout, rows: Rows, update: int, number: int, *, pretrained: bool = False) -> Tensor:
        """(B,) m of the pictures at the level and noise of a draw."""
        x_k, k, wanted = self._noised(rollout, rows, update, number)
        text = self.loss.text_of(rollout, rows)
        found = self.policy.predict(x_k, self.schedule.timesteps[k], text, pretrained=pretrained, unguided=True)
        return (found.conditional.float() - wanted).square().flatten(1).mean(1)

    @torch.no_grad()
    def _noised(self, rollout: Rollout, rows: Rows, update: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(noised latents (B, C, H, W), their levels (B,), the exact outputs (B, C, H, W))."""
        trajectories, schedule, text = rollout.trajectories, self.schedule, self.loss.text_of(rollout, rows)
        x_0 = last_latents(self.policy, trajectories.states(-1, rows), text)
        first = first_of_group(trajectories.sample_id[rows], self.per_group)
        draw = update * self.section.draws + number
        k = self._levels(first, draw)
        noise = draw_noise_anew(trajectories.seed, first, draw, tuple(x_0.shape[1:]), torch.float32)
        signal, noise_level, x0_x, x0_output = (
            column[k][:, None, None, None].float()
            for column in (schedule.signal_t, schedule.noise_t, schedule.x0_x, schedule.x0_output)
        )
        x_k = signal * x_0 + noise_level * noise
        return x_k, k, (x_0 - x0_x * x_k) / x0_output

    def _levels(self, first: Tensor, draw: int) -> Tensor:
        """(B,) int64 the level of each row, from the first sample id (B,) of its group."""
        groups = self.recipe.train.trajectories // self.per_group
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + draw)
        levels = torch.randint(self.schedule.num_transitions, (groups,), generator=generator).to(first.device)
        return levels[first // self.per_group % groups]
