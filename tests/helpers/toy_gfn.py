"""Diffusion chains in one or two dimensions whose data distribution, target and optimum are known in closed form.

The pretrained model is exact: its data distribution is a Gaussian mixture, so the score is a formula. The policy is that score
plus a learnt combination of normalised radial basis functions, with a table of weights for each step; so is the flow. What is
under test (the chain's coefficients and densities, the residual, the objectives) comes from `dag`; this module has the
mixtures, the tables, a training loop and an independent reference.

Legend: S seeds trained at once, B trajectories each, N = S * B rows (seed-major), T transitions, D dimensions
of the state, J basis functions. Transitions are (T, N, ...) here, flattened step-major into `Transition`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dag.chain.levels import Levels
from dag.chain.schedule import Schedule
from dag.objectives import Objective, UpdateScalars, pathwise
from dag.objectives.transition import Transition, residual_table
from dag.recipe import Balance


class Density(Protocol):
    """A density, perhaps not normalised."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (N,) at x (N, D)."""
        ...


@dataclass(frozen=True)
class Mixture:
    """The Gaussian mixture sum_i weights_i N(means_i, sd^2 I), with weights (M,) and means (M, D)."""

    weights: Tensor
    means: Tensor
    sd: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (N,) at x (N, D)."""
        return self._log_joint(x, torch.ones(1, 1)).logsumexp(1)

    def eps(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """The optimal noise prediction (N, D): -sqrt(1 - ab) score(x) of this distribution noised to `alpha_bar`, () or (N,)."""
        alpha_bar = alpha_bar.reshape(-1, 1)
        posterior = self._log_joint(x, alpha_bar).softmax(1)
        pull = x - alpha_bar.sqrt() * (posterior @ self.means)
        return (1 - alpha_bar).sqrt() * pull / noised_variance(self.sd, alpha_bar)

    def nearest_mode(self, x: Tensor) -> Tensor:
        """The mode (N,) int64 whose mean is closest to x (N, D)."""
        return torch.cdist(x, self.means).argmin(1)

    def _log_joint(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        """log weight_i + log N(x; sqrt(ab) mean_i, V I), (N, M), for ab of shape (1, 1) or (N, 1)."""
        variance = noised_variance(self.sd, alpha_bar)
        square = (x[:, None] - alpha_bar.sqrt()[:, :, None] * self.means).square().sum(2)
        return self.weights.log() - 0.5 * square / variance - 0.5 * x.shape[1] * (2 * math.pi * variance).log()


@dataclass(frozen=True)
class Bowl:
    """The reward log R = slope x - (x - centre)^2 / 2 in one dimension, for tilting the data distribution."""

    slope: float
    centre: float

    def log_prob(self, x: Tensor) -> Tensor:
        return (self.slope * x - 0.5 * (x - self.centre).square()).sum(1)


def noised_variance(sd: float, alpha_bar: Tensor) -> Tensor:
    """Variance of a mode with standard deviation `sd` after noising to `alpha_bar`."""
    return alpha_bar * sd**2 + 1 - alpha_bar


def toy_schedule(mode_sd: float, steps: int = 16) -> Schedule:
    """A schedule of `steps` transitions with log-SNR linear in [-5, 5].

    The mean of a DDPM step is exact for any data distribution. Its variance is replaced by the exact one for a single mode
    with standard deviation `mode_sd`, so that only the Gaussian shape of a step keeps a trained policy from its target.
    """
    alpha_bars = torch.linspace(-5, 5, steps + 1, dtype=torch.float64).sigmoid()
    ab_t, ab_next = alpha_bars[:-1], alpha_bars[1:]
    schedule = Schedule.from_levels(Levels.of_alpha_bars(torch.arange(steps).flip(0), alpha_bars), "epsilon")
    rho = ab_t / ab_next
    posterior_variance = 1 / (1 / noised_variance(mode_sd, ab_next) + rho / (1 - rho))
    return replace(schedule, sigma=posterior_variance.sqrt())


def basis(x: Tensor, centres: Tensor) -> Tensor:
    """Normalised radial basis functions (N, J) of x (N, D).

    Their centres are the J = C^D points with coordinates in `centres` (C,); their width is the spacing of the centres.
    """
    spacing = centres[1] - centres[0]
    per_dim = (-0.5 * ((x[:, :, None] - centres) / spacing).square()).softmax(2)
    product = per_dim[:, 0]
    for d in range(1, x.shape[1]):
        product = (product[:, :, None] * per_dim[:, d, None, :]).flatten(1)
    return product


@dataclass(frozen=True)
class Rollout:
    """Trajectories sampled without gradient, and what is computed from them once, without the learnt weights."""

    states: Tensor
    """(T + 1, N, D) states, noise first."""
    features: Tensor
    """(T, N, J) basis functions of every state but the last."""
    exact_eps: Tensor
    """(T, N, D) noise prediction of the pretrained model."""
    log_looking: Tensor
    """(T, N) forward-looking term alpha_bar * log R(x0_hat), with the x0_hat of the policy that sampled."""
    log_reward: Tensor
    """(N,) log R of the final states."""


@dataclass(frozen=True)
class Settings:
    """How a method is trained. The flow learns ten times faster than the policy that it judges."""

    iterations: int
    warmup: int = 100
    """Iterations at the beginning that train only the flow."""
    policy_lr: float = 4e-2
    flow_lr: float = 4e-1
    decay: bool = True
    """Learning rates fall linearly to 0 over the second half."""
    batch: int = 128
    """Trajectories per update, for each seed."""

    def learning_rates(self, iteration: int) -> tuple[float, float]:
        """Learning rates (of the policy, of the flow) at an iteration."""
        left = 2 * (1 - iteration / self.iterations)
        factor = min(1.0, left) if self.decay else 1.0
        return (0.0 if iteration < self.warmup else factor * self.policy_lr), factor * self.flow_lr


class ToyGFN:
    """The pretrained chain with a learnt policy and flow, for S seeds that are trained at once but share nothing.

    `policy` (T, S, J, D) is the table of what is added to the noise prediction, `flow` (T, S, J, 1) that of log F~; both
    start at zero. The target is the reward, or with `has_prior` the data distribution times the reward.
    """

    weights: Tensor
    """(T,) weights of the forward-looking term; alpha_bar unless they are set."""
    looks_through_policy = True
    """Whether the policy's x0_hat is looked at; else that of the pretrained chain."""
    stand_in: Callable[[Tensor], Tensor] | None = None
    """What is differentiated in place of the reward, (N, D) -> (N,); None takes the reward itself."""

    def __init__(self, data: Mixture, reward: Density, centres: Tensor, seeds: int, has_prior: bool = False) -> None:
        self.data, self.reward, self.centres, self.has_prior = data, reward, centres, has_prior
        self.schedule = toy_schedule(data.sd).to("cpu")  # in float32, like the states
        self.seeds, self.dims = seeds, data.means.shape[1]
        T, J = self.schedule.num_transitions, len(centres) ** self.dims
        self.policy = torch.zeros(T, seeds, J, self.dims, requires_grad=True)
        self.flow = torch.zeros(T, seeds, J, 1, requires_grad=True)
        self.weights = self.schedule.alpha_bar_t
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]

    def noise(self, batch: int) -> Tensor:
        """Standard normal noise (S * B, D), with a generator for each seed."""
        return torch.cat([torch.randn(batch, self.dims, generator=generator) for generator in self.generators])

    def output(self, k: int, features: Tensor, exact_eps: Tensor) -> Tensor:
        """The policy's noise prediction (N, D) at step k."""
        return exact_eps + self._lookup(self.policy[k : k + 1], features[None])[0]

    @torch.no_grad()
    def rollout(self, batch: int) -> Rollout:
        """Sample `batch` trajectories of the current policy for each seed."""
        T, x = self.schedule.num_transitions, self.noise(batch)
        states, features, exact, outputs = [x], [], [], []
        for k in range(T):
            features.append(basis(x, self.centres))
            exact.append(self.data.eps(x, self.schedule.alpha_bar_t[k]))
            outputs.append(self.output(k, features[k], exact[k]))
            x = self.schedule.sample_next(x, outputs[k], self.noise(batch), k)
            states.append(x)
        ks = torch.arange(T).repeat_interleave(len(x))
        looking = outputs if self.looks_through_policy else exact
        x0_hat = self.schedule.x0_hat(torch.cat(states[:-1]), torch.cat(looking), ks)
        return Rollout(
            states=torch.stack(states),
            features=torch.stack(features),
            exact_eps=torch.stack(exact),
            log_looking=(self.weights[ks] * self.reward.log_prob(x0_hat)).view(T, -1),
            log_reward=self.reward.log_prob(x),
        )

    def loss(self, objective: Objective, rollout: Rollout) -> Tensor:
        """Sum over the seeds of each seed's mean loss over all transitions of its trajectories."""
        (T, N), S = rollout.log_looking.shape, self.seeds
        k = torch.arange(T).repeat_interleave(N)
        x_t, x_next = rollout.states[:-1].flatten(0, 1), rollout.states[1:].flatten(0, 1)
        output = (rollout.exact_eps + self._lookup(self.policy, rollout.features)).flatten(0, 1)
        log_pf = self.schedule.log_pf(x_t, x_next, output, k)
        if self.has_prior:
            log_pb = self.schedule.log_pf(x_t, x_next, rollout.exact_eps.flatten(0, 1), k)
        else:
            log_pb = self.schedule.log_pb(x_t, x_next, k)
        log_F_tilde = self._lookup(self.flow, rollout.features)[..., 0]
        if getattr(getattr(objective, "config", None), "flow_is_log_z", False):
            log_F_tilde = log_F_tilde[:1].expand(T, N)  # every step trains that of the first noise
        past_the_end, pulls = torch.zeros(1, N), self._pulls(objective, rollout, output.view(T, N, -1))
        transition = Transition(
            k=k,
            is_terminal=k == T - 1,
            log_pf=log_pf,
            log_pf_old=log_pf.detach(),
            log_pb=log_pb,
            log_reward=rollout.log_reward.repeat(T),
            log_F_tilde=log_F_tilde.flatten(),
            log_F_tilde_next=torch.cat([log_F_tilde[1:], past_the_end]).flatten(),
            log_looking=rollout.log_looking.flatten(),
            log_looking_next=torch.cat([rollout.log_looking[1:], past_the_end]).flatten(),
            **self._tables(objective, rollout, log_F_tilde, log_pf.view(T, N), log_pb.view(T, N)),
            **pulls,
        )
        return objective(transition).loss.view(T, S, N // S).mean((0, 2)).sum()

    def _pulls(self, objective: Objective, rollout: Rollout, output: Tensor) -> dict[str, Tensor]:
        """The fields (T * N,) of transitions that the flow's gradient gives, for an objective that takes it.

        Args:
            output: (T, N, D) the policy's noise prediction, with its gradient.
        """
        section = getattr(objective, "config", None)
        if not isinstance(section, Balance) or not section.takes_gradient:
            return {}
        (T, N), x_t = rollout.log_looking.shape, rollout.states[:-1]
        y, value = self._look(rollout.states[1:], has_flow=section.has_flow)
        targets = [
            pathwise.against_pretrained(self.schedule, k, y[k], rollout.exact_eps[k])
            if self.has_prior
            else pathwise.against_noising(self.schedule, k, y[k], x_t[k])
            for k in range(T)
        ]
        x, k = x_t.flatten(0, 1), torch.arange(T).repeat_interleave(N)
        towards = torch.cat([target.output for target in targets])
        kl = self.schedule.transition_log_probs(x, x, output.flatten(0, 1), k, 1.0, towards).kl
        assert kl is not None
        found = {"pathwise": torch.tensor([float(target.weight) for target in targets])[k] * kl}
        if getattr(section, "policy_gradient", "") == "control_variate":
            scored = torch.cat([rollout.log_looking[1:], rollout.log_reward[None]])
            found["unexplained"] = (scored - value).flatten()
        return found

    def _look(self, states: Tensor, *, has_flow: bool) -> tuple[Tensor, Tensor]:
        """(gradient (T, N, D) of log F, value (T, N) of its forward-looking term or log reward) at the states after each step."""
        reward = self.reward.log_prob if self.stand_in is None else self.stand_in
        T, N = states.shape[:2]
        k = torch.arange(1, T).repeat_interleave(N)
        with torch.enable_grad():
            x = states.detach().requires_grad_(True)
            noisy = x[:-1].flatten(0, 1)
            output = self.data.eps(noisy, self.schedule.alpha_bar_t[k])
            features = basis(noisy, self.centres).view(T - 1, N, -1)
            if self.looks_through_policy:
                output = output + self._lookup(self.policy[1:], features).flatten(0, 1)
            looking = self.weights[k] * reward(self.schedule.x0_hat(noisy, output, k))
            value = torch.cat([looking, reward(x[-1])]).view(T, N)
            log_F = value.sum()
            if has_flow:
                log_F = log_F + self._lookup(self.flow[1:], features).sum()
            (gradient,) = torch.autograd.grad(log_F, x)
        return gradient, value.detach()

    @torch.no_grad()
    def _tables(
        self, objective: Objective, rollout: Rollout, log_F_tilde: Tensor, log_pf: Tensor, log_pb: Tensor
    ) -> dict[str, Tensor]:
        """The fields (T * N,) of transitions that the objective forms of an update, separately for each seed."""
        T, N = log_pf.shape
        rewards = rollout.log_reward.split(N // self.seeds)
        from_rewards = [objective.observe(reward, torch.zeros(len(reward))) for reward in rewards]
        given = [one for one in from_rewards if one is not None]
        if given:
            return {"advantage": torch.cat(given).repeat(T)}
        delta = residual_table(log_F_tilde.T, rollout.log_looking.T, log_pf.T, log_pb.T, rollout.log_reward)
        tables = (table.split(N // self.seeds) for table in ((log_pf - log_pb).T, rollout.log_reward, delta))
        known = [
            UpdateScalars(
                log_ratio=log_ratio, log_reward=reward, reward=reward, residuals=rows, residual_scale=torch.ones(T),
                running_mean=torch.zeros(T),
            )
            for log_ratio, reward, rows in zip(*tables, strict=True)
        ]  # fmt: skip
        found = {"advantage": map(objective.advantages, known), "flow_slope": map(objective.flow_slopes, known)}
        formed = {name: [one for one in tables if one is not None] for name, tables in found.items()}
        return {name: torch.cat(tables).T.flatten() for name, tables in formed.items() if tables}

    def train(self, objective: Objective, settings: Settings) -> None:
        """Train on-policy: each rollout gives one update from all its transitions."""
        optimizer = torch.optim.Adam([{"params": [self.policy]}, {"params": [self.flow]}], betas=(0.9, 0.99), eps=1e-4)
        for iteration in range(settings.iterations):
            for group, rate in zip(optimizer.param_groups, settings.learning_rates(iteration), strict=True):
                group["lr"] = rate
            optimizer.zero_grad()
            self.loss(objective, self.rollout(settings.batch)).backward()
            for table in (self.policy, self.flow):
                clip_per_seed(table)
            optimizer.step()

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """The final states (S, count, D) of new trajectories."""
        return self.rollout(count).states[-1].view(self.seeds, count, self.dims)

    @torch.no_grad()
    def initial_log_F(self, count: int) -> Tensor:
        """The mean of log F over the initial noise, (S,)."""
        rollout = self.rollout(count)
        log_F = self._lookup(self.flow, rollout.features)[0, :, 0] + rollout.log_looking[0]
        return log_F.view(self.seeds, count).mean(1)

    def _lookup(self, table: Tensor, features: Tensor) -> Tensor:
        """The values (T, N, D') of a table (T, S, J, D') at features (T, N, J)."""
        T, N, J = features.shape
        rows = features.view(T, self.seeds, N // self.seeds, J)
        if table.shape[3] == 1:
            # The same sums, five times faster than a matrix product with one column.
            return (rows * table.mT).sum(3, keepdim=True).flatten(1, 2)
        return (rows @ table).flatten(1, 2)


def clip_per_seed(table: Tensor, norm: float = 1.0) -> None:
    """Scale the gradient of a table (T, S, J, D'), if it has one, to at most `norm` for each seed."""
    if table.grad is not None:
        norms = table.grad.square().sum((0, 2, 3), keepdim=True).sqrt()
        table.grad /= (norms / norm).clamp(min=1.0)


GRID = torch.linspace(-5, 5, 1001, dtype=torch.float64)
"""The points on which distributions in one dimension are tabulated, as probabilities (1001,) float64."""


@dataclass(frozen=True)
class Fit:
    """The distance of a distribution in one dimension from another."""

    left: float
    """The distribution's mass below zero."""
    kl: float
    """KL(distribution || other) of histograms with bins of 0.1, in nats."""
    w1: float
    """Wasserstein-1 distance."""

    def __str__(self) -> str:
        return f"left mass {self.left:.3f}  KL {self.kl:.4f}  W1 {self.w1:.3f}"


def fit(distribution: Tensor, other: Tensor) -> Fit:
    """Compare two distributions on GRID."""
    p, q = (values[:-1].view(-1, 10).sum(1) for values in (distribution, other))
    return Fit(
        left=float(distribution[: len(GRID) // 2].sum()),
        kl=float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum()),
        w1=float((distribution.cumsum(0) - other.cumsum(0)).abs().sum() * (GRID[1] - GRID[0])),
    )


def on_grid(*factors: Density) -> Tensor:
    """The product of one-dimensional densities as a distribution on GRID."""
    points = GRID.float()[:, None]
    return torch.stack([factor.log_prob(points).double() for factor in factors]).sum(0).softmax(0)


def histogram(samples: Tensor) -> Tensor:
    """Samples (n,) as a distribution on GRID, each at its nearest point."""
    spacing = GRID[1] - GRID[0]
    nearest = ((samples.double() - GRID[0]) / spacing).round().clamp(0, len(GRID) - 1).long()
    return torch.bincount(nearest, minlength=len(GRID)).double() / len(samples)


def best_gaussian_steps(reward: Density, schedule: Schedule, prior: Mixture | None = None) -> tuple[Tensor, float]:
    """The best policy with steps N(mu_k(x), sigma_k^2), by dynamic programming.

    Returns its distribution on GRID and the mean of log F_0 over the initial noise.

    Detailed balance cannot hold exactly where the posterior F' P_B / F of a step is not Gaussian. The fixed point of DAG's
    updates then minimises KL(P_F || F' P_B / F) in each step; going backwards from log F_T = log R,

        log F_k(x) = max_mu E_{x' ~ N(mu, sigma_k^2)}[log F_{k+1}(x') + log P_B(x | x') - log P_F(x')].

    mu is searched on GRID; of `dag` only the noise levels and sigma are used. With the data distribution as a prior, whose
    chain has steps N(m_k(x), sigma_k^2), the log-probability of that step takes the place of log P_B.
    """
    log_F = reward.log_prob(GRID.float()[:, None]).double()
    kernels = []
    for k in reversed(range(schedule.num_transitions)):
        rho, sigma = schedule.noising_x[k].square(), schedule.sigma[k]
        step = (-0.5 * ((GRID - GRID[:, None]) / sigma).square()).softmax(1)
        if prior is None:
            misfit = (GRID[:, None] - rho.sqrt() * GRID).square() + rho * sigma.square()
            gain = step @ log_F - 0.5 * misfit / (1 - rho) - 0.5 * ((1 - rho) / sigma.square()).log() + 0.5
        else:
            eps = prior.eps(GRID[:, None].float(), schedule.alpha_bar_t[k].float())[:, 0].double()
            mean = schedule.mean_x[k] * GRID + schedule.mean_output[k] * eps
            gain = step @ log_F - 0.5 * ((GRID - mean[:, None]) / sigma).square()
        log_F, best = gain.max(1)
        kernels.append(step[best])
    initial = distribution = (-0.5 * GRID.square()).softmax(0)
    for kernel in reversed(kernels):
        distribution = distribution @ kernel
    return distribution, float(initial @ log_F)
