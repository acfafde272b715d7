"""Fits the state flow to a rollout: its per-step constants and slopes, running means and scales of residuals, flow-only updates.

The UNet is not called here: log P_F is that of sampling time.

Legend: N trajectories, B of them, T transitions.
"""

from collections.abc import Callable

import torch
from dag_kernels import residual, with_rewarded_end
from torch import Tensor

from dag.chain.schedule import Schedule
from dag.chain.trajectory import Rows, Trajectories, count, cut, on_cpu
from dag.objectives import transition
from dag.objectives.log_scale import LogTerms
from dag.objectives.state_flow import StateFlow, norm_excess
from dag.run.processes import ALONE, Processes
from dag.training.embeddings import Embeddings
from dag.training.optimizer import ClippedOptimizer

# Weight of a new rollout in the running means and scales of each step.
_RUNNING_RATE = 0.3
_ROWS_AT_ONCE = 64


class FlowFit:
    """The state flow with its optimizer, and the running statistics of its residuals.

    Args:
        optimizer:   the flow's optimizer.
        text:        embeddings of the recipe's prompts.
        calibration: how far a rollout moves the flow's constants and slopes (`flow.calibration`).
        is_scaled:   divide residuals by their running sd per step (`objective.residual_scale: running`).

    Where the flow is log Z of whole trajectories (`log_z: flow`), a trajectory is one step of the balance, and T is 1 here.

    Attributes:
        num_steps:      T.
        residual_scale: (T,) what the residuals of each step are divided by; ones if not `is_scaled`.
        baseline:       (T,) running means of the residuals of each step, for DAG-KL.
        is_calibrated:  whether `recentre` has been called.
    """

    def __init__(
        self,
        flow: StateFlow,
        optimizer: ClippedOptimizer,
        schedule: Schedule,
        text: Embeddings,
        calibration: float,
        is_scaled: bool,
    ) -> None:
        self.flow, self.optimizer, self.schedule, self.text = flow, optimizer, schedule, text
        self.calibration, self.is_scaled = calibration, is_scaled
        self.num_steps = len(flow.constants)
        self.residual_scale = torch.ones(self.num_steps, device=schedule.timesteps.device)
        self.baseline = torch.zeros_like(self.residual_scale)
        self.is_calibrated = False

    def step_weights(self) -> Tensor:
        """(T,) weights s_k / mean(s) of the steps' losses, with s the residual scale; ones if residuals are not scaled.

        The gradient of (s_k / mean s) g(delta / s_k) is g'(delta / s_k) / mean s, so that steps with large and with small
        residuals count alike. Without this weight the gradient is divided by s_k twice, and the steps with small residuals,
        which hardly depend on the reward, dominate.
        """
        return self.residual_scale / self.residual_scale.mean()

    def log_F_tilde(self, trajectories: Trajectories, rows: Rows, k: int | Tensor) -> Tensor:
        """(B,) learnt flow at state k of each row, with gradients. If k is (B,), `rows` must be indices too."""
        ks = torch.full((count(rows),), k, device=self.baseline.device) if isinstance(k, int) else k
        return self.log_F_tilde_at(trajectories.states(k, rows), trajectories.prompt_id[on_cpu(rows)], ks)

    def log_F_tilde_at(self, x_t: Tensor, prompt_id: Tensor, ks: Tensor) -> Tensor:
        """(B,) learnt flow at states x_t (B, C, H, W) of the steps `ks` (B,), with gradients."""
        return self.flow(x_t, self.schedule.timesteps[ks], ks, self.text.rows(prompt_id))

    @torch.no_grad()
    def residuals(self, trajectories: Trajectories, terms: LogTerms, rows: Rows) -> Tensor:
        """(B, T) residuals of some trajectories, from the log P_F of sampling time and the current flow."""
        steps = range(self.num_steps)
        parts = cut(rows, _ROWS_AT_ONCE)
        table = torch.cat(
            [torch.stack([self.log_F_tilde(trajectories, part, k) for k in steps], dim=1) for part in parts]
        )
        return transition.residual_table(
            table, terms.log_looking[rows], terms.log_pf[rows], terms.log_pb[rows], terms.log_reward[rows]
        ).float()

    @torch.no_grad()
    def excess(self, trajectories: Trajectories, rows: Rows) -> Tensor | None:
        """(B, T) `norm_excess` of the states before each transition, which `recentre` needs for slopes; None without them."""
        if self.flow.slopes is None:
            return None
        steps = range(self.num_steps)
        return torch.stack([norm_excess(trajectories.states(k, rows)) for k in steps], dim=1)

    def recentre(self, residuals: Tensor, excess: Tensor | None) -> None:
        """Move the flow's slopes towards narrow residuals (N, T) of a rollout and its constants towards residuals with a zero
        mean, and update the running statistics.

        Args:
            excess: (N, T) `excess` of the rollout; None for a flow without slopes.
        """
        rate = self.calibration if self.is_calibrated else 1.0
        if self.calibration > 0 and self.flow.slopes is not None and excess is not None:
            step = rate * transition.slope_shift(residuals, excess)
            self.flow.slopes += step
            residuals = transition.with_slopes(residuals, excess, step)
        mean = residuals.mean(0)
        # The constants shift all residuals of a step by the same amount, so the spread does not change.
        spread = residuals.std(0, correction=0).clamp(min=1e-6)
        if self.calibration > 0:
            self.flow.constants += rate * transition.constant_shift(residuals)
            mean = (1 - rate) * mean
        if self.calibration > 0 and not self.is_calibrated:
            self.flow.scale.copy_(spread.mean())
        rate = _RUNNING_RATE if self.is_calibrated else 1.0
        self.baseline = (1 - rate) * self.baseline + rate * mean
        if self.is_scaled:
            self.residual_scale = (1 - rate) * self.residual_scale + rate * spread
        self.is_calibrated = True

    def fit(
        self,
        trajectories: Trajectories,
        terms: LogTerms,
        penalty: Callable[[Tensor], Tensor],
        batch: int,
        generator: torch.Generator,
        processes: Processes = ALONE,
        groups: int = 1,
    ) -> None:
        """One shuffled pass over all transitions of a rollout: a flow-only update for each `batch` of them.

        The loss is the mean penalty of delta / s, weighted by `step_weights`. All processes shuffle alike, and each computes
        the gradients of its own transitions.

        Args:
            penalty:   g, elementwise.
            batch:     transitions of an update, in all processes together.
            generator: shuffles; in the same state in every process.
            groups:    the number of updates that share the trajectories, see `dag.run.processes`.
        """
        N, T = processes.size * len(terms.log_pf), terms.log_pf.shape[1]
        device = terms.log_pf.device
        # For each of all N trajectories its row in this process, or -1. On the CPU, since selecting waits for a GPU.
        local_row = torch.full((N,), -1)
        local_row[processes.mine(torch.arange(N), groups)] = torch.arange(N // processes.size)
        for index in torch.randperm(N * T, generator=generator).split(batch):
            is_local = local_row[index // T] >= 0
            rows, k = local_row[index // T][is_local].to(device), (index % T)[is_local].to(device)
            self.optimizer.zero_grad()
            if len(rows):
                delta = self._residual_of(trajectories, terms, rows, k)
                losses = self.step_weights()[k] * penalty(delta / self.residual_scale[k])
                (losses.sum() / len(index)).backward()
            processes.sum_gradients(self.optimizer.parameters)
            self.optimizer.step()
            self.optimizer.check()

    def _residual_of(self, trajectories: Trajectories, terms: LogTerms, rows: Tensor, k: Tensor) -> Tensor:
        """(B,) residuals of the transitions k (B,) of `rows` (B,), with the gradient of log F alone: log F' is a fixed target."""
        T = self.num_steps
        following = (k + 1).clamp(max=T - 1)
        with torch.no_grad():
            log_F_next = self.log_F_tilde(trajectories, rows, following) + terms.log_looking[rows, following]
            log_F_next = with_rewarded_end(log_F_next, terms.log_reward[rows], k == T - 1)
        log_F = self.log_F_tilde(trajectories, rows, k) + terms.log_looking[rows, k]
        return residual(log_F, terms.log_pf[rows, k], terms.log_pb[rows, k], log_F_next)


def describe_residuals(residuals: Tensor) -> dict[str, float | list[float]]:
    """The metrics of a rollout's residuals (N, T), to be taken before the flow is fitted to them."""
    return {
        "residual_mean": float(residuals.mean()),
        "residual_rms": float(residuals.square().mean().sqrt()),
        "residual_mean_per_step": residuals.mean(0).tolist(),
        "residual_rms_per_step": residuals.square().mean(0).sqrt().tolist(),
    }
