"""The Gaussian chain of a diffusion sampler as one table of per-step coefficients.

    +--------------------------------------------------------------------------------------------+
    |  Direction. GFlowNets build an object step by step, so their *forward* policy P_F is the     |
    |  diffusion model's *reverse* (denoising) step, and their backward policy P_B is the fixed    |
    |  noising kernel. From here on: P_F denoises, P_B adds noise, `x_next` is the cleaner state.  |
    +--------------------------------------------------------------------------------------------+

    x_next ~ P_F(. | x_t) = N(mu, sigma_t^2 I),   mu = sqrt(ab_next) x0_hat + direction * eps_hat
    x_t    ~ P_B(. | x_next) = N(sqrt(rho) x_next, (1 - rho) I),              rho = ab_t / ab_next

with ab = alphas_cumprod, the DDIM variance sigma_t = eta sqrt((1 - ab_next)/(1 - ab_t) (1 - rho)) (Song et al.
2021, Eq. 16) and direction = sqrt(1 - ab_next - sigma_t^2). x0_hat and eps_hat are linear in (x_t, network
output) for every prediction type, hence so is mu. This module calls no network; noise comes from its caller or, counter-based,
from `dag_kernels`.

Legend: B samples, T transitions, k index of a transition (0 = noisiest), D latent elements per sample.
"""

import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from dag_kernels import PLAIN, Kernels, SampledStep, TransitionLogProbs, at_least_float32, gaussian_log_prob
from torch import Tensor

Reduction = Literal["sum", "mean"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# What the counter-based noise of x_T has in the place of the step k.
INITIAL_NOISE = 0xFFFFFFFF


@dataclass(frozen=True)
class FinalStep:
    """A deterministic last step (ab_next = 1 or ab_next = ab_t): x_0 = mean_x x_t + mean_output o, o the network output.

    It has no density, so it is no transition of the chain: it is taken just before decoding.
    """

    timestep: int
    mean_x: float
    mean_output: float

    def __call__(self, x_t: Tensor, model_output: Tensor) -> Tensor:
        return self.mean_x * x_t.float() + self.mean_output * model_output.float()


@dataclass(frozen=True)
class Schedule:
    """The coefficients of every transition, (T,) each; o is the network output. Float64 on the CPU; `to` makes them float32."""

    timesteps: Tensor
    """(T,) int64, in sampling order."""
    alpha_bar_t: Tensor
    alpha_bar_next: Tensor
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

        Args:
            scheduler: has `config`, `alphas_cumprod` and `set_timesteps`; it is not modified.
            num_steps: denoising steps, 1 .. num_train_timesteps.
            eta:       DDIM's variance scale, > 0; 1 gives the DDPM posterior variance.

        Raises:
            ValueError: eta <= 0 (a deterministic chain has no density), too many steps, an unknown prediction
                type, or timesteps that do not strictly decrease.
        """
        if not eta > 0:
            raise ValueError(
                f"sampler.eta={eta} gives deterministic steps that have no density; DAG needs eta > 0 (the paper uses 1.0)"
            )
        num_train = int(scheduler.config.num_train_timesteps)
        if not 1 <= num_steps <= num_train:
            raise ValueError(
                f"sampler.steps={num_steps}: this model was trained on {num_train} steps; use 1 to {num_train}"
            )
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_steps)
        timesteps = torch.as_tensor(scheduler.timesteps).to("cpu", torch.int64)
        if len(timesteps) != num_steps or not bool((timesteps[1:] < timesteps[:-1]).all()):
            raise ValueError(
                f"{type(scheduler).__name__} does not take {num_steps} strictly decreasing steps; "
                "convert it first: DDIMScheduler.from_config(scheduler.config)"
            )
        alpha_bars = _alphas_cumprod(scheduler)
        alpha_bar_t = alpha_bars[timesteps]
        # The scheduler says what the noise level after the last step is; it is not that of t - 1000/T.
        last = _final_alpha_cumprod(scheduler, alpha_bars)
        alpha_bar_next = torch.cat([alpha_bar_t[1:], last[None]])
        return cls.from_alpha_bars(timesteps, alpha_bar_t, alpha_bar_next, scheduler.config.prediction_type, eta)

    @classmethod
    def from_alpha_bars(
        cls,
        timesteps: Tensor,
        alpha_bar_t: Tensor,
        alpha_bar_next: Tensor,
        prediction_type: str,
        eta: float = 1.0,
    ) -> Self:
        """The coefficients for given noise levels (T,), by the formulas at the top of this module.

        A last step that is deterministic (sigma = 0) becomes `final`, and the chain ends before it.

        Raises:
            ValueError: eta > 1, or no step is stochastic.
        """
        ab_t, ab_next = alpha_bar_t.double(), alpha_bar_next.double()
        rho = ab_t / ab_next
        sigma = eta * ((1 - ab_next) / (1 - ab_t) * (1 - rho)).sqrt()
        if bool((1 - ab_next - sigma**2 < -1e-12).any()):
            raise ValueError(f"sampler.eta={eta} asks for more variance than the noise level of a step; use eta <= 1")
        direction = (1 - ab_next - sigma**2).clamp(min=0).sqrt()
        x0_x, x0_output = x0_coefficients(prediction_type, ab_t)
        eps_x, eps_output = eps_coefficients(prediction_type, ab_t)
        table: dict[str, Any] = {
            "timesteps": timesteps,
            "alpha_bar_t": ab_t,
            "alpha_bar_next": ab_next,
            "sigma": sigma,
            "mean_x": ab_next.sqrt() * x0_x + direction * eps_x,
            "mean_output": ab_next.sqrt() * x0_output + direction * eps_output,
            "x0_x": x0_x,
            "x0_output": x0_output,
            "noising_x": rho.sqrt(),
            "noising_std": (1 - rho).sqrt(),
        }
        final = None
        if float(sigma[-1]) == 0.0:
            final = FinalStep(int(timesteps[-1]), float(table["mean_x"][-1]), float(table["mean_output"][-1]))
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
    def x0_in_bfloat16(self) -> list[tuple[float, float]]:
        """(x0_x, x0_output) of every step as the published code computes them, from alpha_bar in bfloat16. Near the data it
        rounds to 1, so that x0_hat is the noisy state itself there."""
        alpha_bar = self.alpha_bar_t.bfloat16().double().cpu()
        columns = x0_coefficients(self.prediction_type, alpha_bar)
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


def x0_coefficients(prediction_type: str, ab_t: Tensor) -> tuple[Tensor, Tensor]:
    """(x0_x, x0_output) of x0_hat = x0_x x_t + x0_output o, shaped like `ab_t`. Raises ValueError for an unknown type."""
    signal, noise = ab_t.sqrt(), (1 - ab_t).sqrt()
    if prediction_type == "epsilon":
        if bool((ab_t == 0).any()):
            raise ValueError(
                "a zero-terminal-SNR schedule cannot be walked with epsilon prediction; use a v-prediction model"
            )
        return 1 / signal, -noise / signal
    if prediction_type == "v_prediction":
        return signal, -noise
    if prediction_type == "sample":
        return torch.zeros_like(ab_t), torch.ones_like(ab_t)
    raise ValueError(f"prediction_type {prediction_type!r} is not known; known: {', '.join(PREDICTION_TYPES)}")


def eps_coefficients(prediction_type: str, ab_t: Tensor) -> tuple[Tensor, Tensor]:
    """(eps_x, eps_output) of eps_hat = eps_x x_t + eps_output o, shaped like `ab_t`, for a known prediction type."""
    signal, noise = ab_t.sqrt(), (1 - ab_t).sqrt()
    if prediction_type == "epsilon":
        return torch.zeros_like(ab_t), torch.ones_like(ab_t)
    if prediction_type == "v_prediction":
        return noise, signal
    return 1 / noise, -signal / noise


def _alphas_cumprod(scheduler: Any) -> Tensor:
    """alphas_cumprod in float64. Where the betas follow a known formula they are computed anew: diffusers rounds to float32."""
    config, betas = scheduler.config, None
    if not config.get("rescale_betas_zero_snr") and config.get("trained_betas") is None:
        start, end, steps = config.beta_start, config.beta_end, config.num_train_timesteps
        if config.beta_schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif config.beta_schedule == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
    return scheduler.alphas_cumprod.double() if betas is None else torch.cumprod(1 - betas, 0)


def _final_alpha_cumprod(scheduler: Any, alpha_bars: Tensor) -> Tensor:
    """alpha_bar after the last step: alphas_cumprod[0] if the scheduler has set_alpha_to_one=False, else 1."""
    keeps_noise = scheduler.config.get("set_alpha_to_one") is False
    return alpha_bars[0] if keeps_noise else torch.ones((), dtype=torch.float64)


def _at(table: Tensor, k: int | Tensor, like: Tensor) -> Tensor:
    """Row k of a (T,) table, shaped to multiply `like` (B, ...), in its dtype."""
    value = table[k].to(like.device, like.dtype)
    return value.reshape(-1, *([1] * (like.dim() - 1))) if value.dim() else value


def _reduced(log_prob: Tensor, like: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: use 'sum' or 'mean'")
    return log_prob if reduction == "sum" else log_prob / like[0].numel()
