"""The Gaussian chain of a diffusion sampler as one table of per-step coefficients.

    +--------------------------------------------------------------------------------------------+
    |  Direction. GFlowNets build an object step by step, so their *forward* policy P_F is the     |
    |  diffusion model's *reverse* (denoising) step, and their backward policy P_B is the fixed    |
    |  noising kernel. From here on: P_F denoises, P_B adds noise, `x_next` is the cleaner state.  |
    +--------------------------------------------------------------------------------------------+

    x_next ~ P_F(. | x_t) = N(mu, sigma_t^2 I),   mu = a_next x0_hat + direction * eps_hat
    x_t    ~ P_B(. | x_next) = N(r x_next, c^2 I),                          r = a_t / a_next,   c^2 = s_t^2 - r^2 s_next^2

where x_t = a_t x_0 + s_t eps, with signal a and noise s (`dag.chain.levels`). sigma_t = eta s_next c / s_t is for eta = 1 the
standard deviation of P_B's posterior q(x_next | x_t, x_0). With direction = sqrt(s_next^2 - sigma_t^2) the noise of x_next is
s_next whatever eta is. For a diffusion model, with a^2 + s^2 = 1, this is DDIM (Song et al. 2021, Eq. 12 and 16). x0_hat and
eps_hat are linear in (x_t, network output) for every prediction type, hence so is mu. This module calls no network; noise comes
from its caller or, counter-based, from `dag_kernels`.

Legend: B samples, T transitions, k index of a transition (0 = noisiest), D latent elements per sample.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from dag_kernels import PLAIN, Kernels, SampledStep, TransitionLogProbs, at_least_float32, gaussian_log_prob
from torch import Tensor

from dag.chain.levels import Levels, eps_coefficients, noising, x0_coefficients

Reduction = Literal["sum", "mean"]
# What the counter-based noise of x_T has in the place of the step k.
INITIAL_NOISE = 0xFFFFFFFF


@dataclass(frozen=True)
class FinalStep:
    """A deterministic last step, to a state without noise or of equal noise: x_0 = mean_x x_t + mean_output o.

    o is the network's output. The step has no density, so it is no transition of the chain: it is taken just before decoding.
    """

    timestep: float
    mean_x: float
    mean_output: float

    def __call__(self, x_t: Tensor, model_output: Tensor) -> Tensor:
        return self.mean_x * x_t.float() + self.mean_output * model_output.float()


@dataclass(frozen=True)
class Schedule:
    """The coefficients of every transition, (T,) each; o is the network output. Float64 on the CPU; `to` makes them float32."""

    timesteps: Tensor
    """What the network is told, in sampling order; int64 for a diffusion model."""
    signal_t: Tensor
    """x_t = signal_t x_0 + noise_t eps, and likewise x_next."""
    noise_t: Tensor
    signal_next: Tensor
    noise_next: Tensor
    alpha_bar_t: Tensor
    """signal_t^2 / (signal_t^2 + noise_t^2); for a diffusion model alphas_cumprod."""
    sigma: Tensor
    """Standard deviation of P_F, > 0."""
    mean_x: Tensor
    """mu = mean_x * x_t + mean_output * o."""
    mean_output: Tensor
    x0_x: Tensor
    """x0_hat = x0_x * x_t + x0_output * o."""
    x0_output: Tensor
    noising_x: Tensor
    """P_B = N(noising_x * x_next, noising_std^2 I)."""
    noising_std: Tensor
    prediction_type: str
    final: FinalStep | None = None
    kernels: Kernels = PLAIN
    """The implementation (PyTorch or Triton) of `sampling_step` and `transition_log_probs`."""

    @classmethod
    def from_diffusers(cls, scheduler: Any, num_steps: int, eta: float = 1.0) -> Self:
        """The chain through which a DDIM or DDPM scheduler of diffusers goes in `num_steps` steps.

        Raises ValueError as `Levels.of_diffusion` and `from_levels` do.
        """
        return cls.from_levels(Levels.of_diffusion(scheduler, num_steps), scheduler.config.prediction_type, eta)

    @classmethod
    def from_levels(cls, levels: Levels, prediction_type: str, eta: float = 1.0, sde: str = "posterior") -> Self:
        """The coefficients of a chain with these noise levels, by the formulas at the top of this module.

        A last step that is deterministic (it ends without noise, or changes nothing) becomes `final`, and the chain ends before it.

        Args:
            eta: scale of the noise, > 0; 1 gives the posterior of the noising kernel.
            sde: `posterior`, or `flow_grpo` for a velocity.

        Raises:
            ValueError: eta <= 0 (a deterministic chain has no density) or > 1, or no step is stochastic.
        """
        if not eta > 0:
            raise ValueError(
                f"sampler.eta={eta} gives deterministic steps that have no density; DAG needs eta > 0 (the paper uses 1.0)"
            )
        a_t, s_t, a_next, s_next = levels.signal[:-1], levels.noise[:-1], levels.signal[1:], levels.noise[1:]
        r, c = noising(levels)
        x0_x, x0_output = x0_coefficients(prediction_type, a_t, s_t)
        steps = _posterior_steps if sde == "posterior" else _flow_grpo_steps
        mean_x, mean_output, sigma = steps(levels, prediction_type, eta)
        table: dict[str, Any] = {
            "timesteps": levels.timesteps,
            "signal_t": a_t,
            "noise_t": s_t,
            "signal_next": a_next,
            "noise_next": s_next,
            "alpha_bar_t": a_t**2 / (a_t**2 + s_t**2),
            "sigma": sigma,
            "mean_x": mean_x,
            "mean_output": mean_output,
            "x0_x": x0_x,
            "x0_output": x0_output,
            "noising_x": r,
            "noising_std": c,
        }
        final = None
        if float(sigma[-1]) == 0.0:
            final = FinalStep(levels.timesteps[-1].item(), float(mean_x[-1]), float(mean_output[-1]))
            table = {name: column[:-1] for name, column in table.items()}
        if not bool((table["sigma"] > 0).all()) or len(table["sigma"]) == 0:
            raise ValueError("this schedule has no stochastic step to learn from; take more steps")
        return cls(**table, prediction_type=prediction_type, final=final)

    @property
    def num_transitions(self) -> int:
        """T, the number of stochastic steps."""
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> Self:
        """This schedule with its tensors on `device`, coefficients in float32."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
        return replace(self, **moved)

    def step_mean(self, x_t: Tensor, model_output: Tensor, k: int | Tensor) -> Tensor:
        """mu, the mean of P_F(x_next | x_t). Shape and dtype like x_t.

        Args:
            x_t:          (B, C, H, W).
            model_output: (B, C, H, W), after guidance, of the schedule's prediction type.
            k:            index of the transition, an int or (B,) int64.
        """
        return self._mean(x_t, model_output, k).to(x_t.dtype)

    def x0_hat(self, x_t: Tensor, model_output: Tensor, k: int | Tensor) -> Tensor:
        """The clean latent predicted from x_t. Shape and dtype like x_t; arguments as for `step_mean`."""
        x, o = at_least_float32(x_t), at_least_float32(model_output)
        return (_at(self.x0_x, k, x) * x + _at(self.x0_output, k, x) * o).to(x_t.dtype)

    def sample_next(self, x_t: Tensor, model_output: Tensor, noise: Tensor, k: int | Tensor) -> Tensor:
        """x_next = mu + sigma_t noise, (B, C, H, W) float32; round it to the stored dtype before using it."""
        return self._mean(x_t, model_output, k) + _at(self.sigma, k, noise) * noise

    def noised_back(self, x_next: Tensor, noise: Tensor, k: int | Tensor) -> Tensor:
        """x_t = r x_next + c noise, drawn from P_B(x_t | x_next): (B, C, H, W) float32, to be rounded like `sample_next`."""
        return _at(self.noising_x, k, noise) * x_next.float() + _at(self.noising_std, k, noise) * noise

    def log_pf(
        self, x_t: Tensor, x_next: Tensor, model_output: Tensor, k: int | Tensor, reduction: Reduction = "sum"
    ) -> Tensor:
        """log P_F(x_next | x_t) of the step k. Gradients reach `model_output` alone.

        Args:
            x_t, x_next:  (B, C, H, W), the stored states.
            model_output: (B, C, H, W), after guidance.
            k:            int or (B,) int64.
            reduction:    "sum" over C, H, W is the true density; "mean" is the published code's scale, 1/D of it.

        Returns:
            (B,) float32 (float64 for float64 inputs).
        """
        mean = self._mean(x_t.detach(), model_output, k)
        return _reduced(
            gaussian_log_prob(at_least_float32(x_next.detach()), mean, _at(self.sigma, k, mean)),
            x_t,
            reduction,
        )

    def log_pb(self, x_t: Tensor, x_next: Tensor, k: int | Tensor, reduction: Reduction = "sum") -> Tensor:
        """log P_B(x_t | x_next), the fixed noising kernel; arguments and result as for `log_pf`."""
        x, mean = at_least_float32(x_t), at_least_float32(x_next)
        mean = _at(self.noising_x, k, mean) * mean
        return _reduced(gaussian_log_prob(x, mean, _at(self.noising_std, k, mean)), x_t, reduction)

    def sampling_step(
        self,
        x_t: Tensor,
        output: Tensor,
        k: int,
        seed: int,
        sample_id: Tensor,
        guidance_scale: float = 1.0,
        chain_dtype: torch.dtype = torch.float32,
    ) -> SampledStep:
        """x_next ~ P_F with counter-based noise, x0_hat and both log-probs. Arguments and result as in
        `dag_kernels.reference.sampling_step`."""
        return self.kernels.sampling_step(x_t, output, self.table, k, seed, sample_id, guidance_scale, chain_dtype)

    def transition_log_probs(
        self,
        x_t: Tensor,
        x_next: Tensor,
        output: Tensor,
        k: Tensor,
        guidance_scale: float = 1.0,
        output_ref: Tensor | None = None,
        output_old: Tensor | None = None,
    ) -> TransitionLogProbs:
        """The log-probs of B transitions, with gradients to `output`, and what the regularisers need. Arguments and result as in
        `dag_kernels.reference.transition_log_probs`."""
        return self.kernels.transition_log_probs(
            x_t, x_next, output, self.table, k, guidance_scale, output_ref, output_old
        )

    @cached_property
    def table(self) -> Tensor:
        """(T, 7) coefficients, in the order of columns that the kernels expect."""
        columns = (self.mean_x, self.mean_output, self.sigma, self.noising_x, self.noising_std, self.x0_x)
        return torch.stack([*columns, self.x0_output], dim=1)

    @cached_property
    def shrinkage(self) -> Tensor:
        """(T,) a / (a^2 + s^2) of x_t: how x0_hat follows x_t where data have unit variance and are independent."""
        return self.signal_t / (self.signal_t**2 + self.noise_t**2)

    @cached_property
    def x0_in_bfloat16(self) -> list[tuple[float, float]]:
        """(x0_x, x0_output) of every step as the published code computes them, from alpha_bar in bfloat16. Near the data it
        rounds to 1, so that x0_hat is the noisy state itself there."""
        alpha_bar = self.alpha_bar_t.bfloat16().double().cpu()
        columns = x0_coefficients(self.prediction_type, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def output_of(self, x_t: Tensor, x_next: Tensor, noise: Tensor, k: int | Tensor) -> Tensor:
        """The network output that led from x_t to x_next with this noise, (B, C, H, W) float32: `sample_next` solved for o."""
        x, xp = at_least_float32(x_t), at_least_float32(x_next)
        return (xp - _at(self.mean_x, k, x) * x - _at(self.sigma, k, x) * noise) / _at(self.mean_output, k, x)

    def policy_kl(self, output: Tensor, other: Tensor, k: int) -> Tensor:
        """(B,) KL in nats from one policy's step k to another's, which depends on their network outputs alone.

        Args:
            output, other: (B, C, H, W) network outputs after guidance; `other` is treated as data.
        """
        ks = torch.full((len(output),), k, device=output.device)
        found = self.transition_log_probs(output, output, output, ks, output_ref=other).kl
        assert found is not None
        return found

    def balanced_weights(self) -> Tensor:
        """(T,) weights min(1, sigma / (2 |b|)) with b = mean_output. The policy gradient of a step is b / sigma times the noise,
        which in the last steps is very large."""
        return (0.5 * self.sigma / self.mean_output.abs()).clamp(max=1.0)

    def _mean(self, x_t: Tensor, model_output: Tensor, k: int | Tensor) -> Tensor:
        x, o = at_least_float32(x_t), at_least_float32(model_output)
        return _at(self.mean_x, k, x) * x + _at(self.mean_output, k, x) * o


def _posterior_steps(levels: Levels, prediction_type: str, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean_x, mean_output, sigma) of every step, (N,) each, by the formulas at the top of this module."""
    a_t, s_t, a_next, s_next = levels.signal[:-1], levels.noise[:-1], levels.signal[1:], levels.noise[1:]
    sigma = eta * s_next * noising(levels)[1] / s_t
    if bool((s_next**2 - sigma**2 < -1e-12).any()):
        raise ValueError(f"sampler.eta={eta} asks for more variance than the noise level of a step; use eta <= 1")
    direction = (s_next**2 - sigma**2).clamp(min=0).sqrt()
    x0_x, x0_output = x0_coefficients(prediction_type, a_t, s_t)
    eps_x, eps_output = eps_coefficients(prediction_type, a_t, s_t)
    return a_next * x0_x + direction * eps_x, a_next * x0_output + direction * eps_output, sigma


def _flow_grpo_steps(levels: Levels, prediction_type: str, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean_x, mean_output, sigma) of every step, (N,) each, of the stochastic sampler of Flow-GRPO (Liu et al. 2025, Eq. 9).

        sigma = g sqrt(h),   mu = x - h (o + g^2 / (2 s) (x + (1 - s) o)),   g^2 = 2 eta^2 s / (1 - s),   h = s_t - s_next

    Its own parameter is sqrt(2) eta: the published 0.7 is eta = 0.495. For small steps it is the posterior's sigma. It adds noise
    without taking away signal, so pictures are a little noisier than their level. The last step is Euler's, without noise.

    Raises:
        ValueError: the network does not predict a velocity.
    """
    if prediction_type != "velocity":
        raise ValueError("sampler.sde=flow_grpo is the sampler of a flow-matching model; use posterior")
    s, h = levels.noise[:-1], levels.noise[:-1] - levels.noise[1:]
    # At s = 1 the formula would divide by zero; the published code takes the second level there.
    bounded = torch.where(s == 1, levels.noise[1], s)
    g2 = 2 * eta**2 * s / (1 - bounded)
    g2[-1] = 0
    return 1 - g2 * h / (2 * s), -h * (1 + g2 * (1 - s) / (2 * s)), (g2 * h).sqrt()


def _at(table: Tensor, k: int | Tensor, like: Tensor) -> Tensor:
    """Row k of a (T,) table, shaped to multiply `like` (B, ...), in its dtype."""
    value = table[k].to(like.device, like.dtype)
    return value.reshape(-1, *([1] * (like.dim() - 1))) if value.dim() else value


def _reduced(log_prob: Tensor, like: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: use 'sum' or 'mean'")
    return log_prob if reduction == "sum" else log_prob / like[0].numel()
