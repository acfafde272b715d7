"""The Gaussian chain: closed forms that determine every coefficient of `Schedule`."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from dag.chain.levels import PREDICTION_TYPES, Levels
from dag.chain.schedule import Schedule
from dag.objectives.transition import residual

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 2, 5)


def stable_diffusion(**changes: object) -> DDIMScheduler:
    return DDIMScheduler(**{**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **changes})


def data(*seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed[0] if seed else 0), dtype=torch.float64)


def network_output(schedule: Schedule, x_t: torch.Tensor, x_0: torch.Tensor, k: int) -> torch.Tensor:
    """The output, in the schedule's prediction type, of a perfect network for data that is the single point x_0."""
    signal, noise = schedule.signal_t[k], schedule.noise_t[k]
    eps = (x_t - signal * x_0) / noise
    return {
        "epsilon": eps,
        "v_prediction": signal * eps - noise * x_0,
        "sample": x_0,
        "velocity": eps - x_0,
    }[schedule.prediction_type]


SD3: dict[str, object] = {"shift": 3.0}
FLUX: dict[str, object] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def flow(config: dict[str, object], steps: int = 28, eta: float = 1.0, sde: str = "posterior") -> Schedule:
    """The chain of a flow-matching model for a picture of 1,024 tokens."""
    return Schedule.from_levels(Levels.of_flow(config, steps, tokens=1024), "velocity", eta, sde)


def diffusion(prediction_type: str, steps: int = 50) -> Schedule:
    return Schedule.from_diffusers(stable_diffusion(prediction_type=prediction_type), steps)


# Values at some of 50 steps of Stable Diffusion's schedule, computed apart from this code from the DDIM formulas in float64.
TABLE = {
    0: (981, 0.005776, 0.007282, 1.122852, -0.232936, 0.454463, 13.15846, -13.12041, 0.890590, 0.454808),
    10: (781, 0.043456, 0.051364, 1.087187, -0.171142, 0.390750, 4.79706, -4.69167, 0.919805, 0.392376),
    48: (21, 0.980381, 0.998296, 1.009096, -0.129287, 0.039480, 1.00996, -0.14146, 0.990986, 0.133962),
    49: (1, 0.998296, 0.999150, 1.000428, -0.020714, 0.020648, 1.00085, -0.04131, 0.999573, 0.029235),
}
COLUMNS = (
    "timesteps",
    "alpha_bar_t",
    "alpha_bar_next",
    "mean_x",
    "mean_output",
    "sigma",
    "x0_x",
    "x0_output",
    "noising_x",
    "noising_std",
)


@pytest.mark.parametrize("k", TABLE)
def test_coefficients_of_stable_diffusion(k: int) -> None:
    schedule = Schedule.from_diffusers(stable_diffusion(), 50)
    columns = {**vars(schedule), "alpha_bar_next": schedule.signal_next**2}
    found = [float(columns[name][k]) for name in COLUMNS]
    # The values above have at least five decimals.
    assert found == pytest.approx(TABLE[k], rel=0, abs=5.1e-6)


CHAINS = {
    **{f"{kind}, {steps} steps": (kind, steps) for kind in PREDICTION_TYPES[:3] for steps in (1, 7, 50)},
    "Stable Diffusion 3": (SD3, 28),
    "FLUX": (FLUX, 28),
    "schnell": ({"shift": 1.0}, 4),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_detailed_balance_holds_exactly_for_a_point_mass(kind: str) -> None:
    """With log F_t = log q(x_t | x_0) and the perfect network as P_F, every residual is zero by Bayes' rule, at any states."""
    model, steps = CHAINS[kind]
    schedule = diffusion(model, steps) if isinstance(model, str) else flow(model, steps)  # type: ignore[arg-type]
    x_0 = data(1)
    for k in range(schedule.num_transitions):
        x_t, x_next = data(2 + k), data(100 + k)

        def log_q(x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            return torch.distributions.Normal(signal * x_0, noise).log_prob(x).flatten(1).sum(1)

        delta = residual(
            log_q(x_t, schedule.signal_t[k], schedule.noise_t[k]),
            schedule.log_pf(x_t, x_next, network_output(schedule, x_t, x_0, k), k),
            schedule.log_pb(x_t, x_next, k),
            log_q(x_next, schedule.signal_next[k], schedule.noise_next[k]),
        )
        # The tolerance is relative to the four terms, whose rounding errors do not cancel.
        assert float(delta.abs().max()) < 1e-9 * float(schedule.log_pb(x_t, x_next, k).abs().max().clamp(min=1))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x0_hat_inverts_the_prediction(prediction_type: str) -> None:
    schedule = flow(SD3) if prediction_type == "velocity" else diffusion(prediction_type)
    x_0 = data(1)
    for k in (0, 12, schedule.num_transitions - 1):
        x_t = data(2)
        torch.testing.assert_close(
            schedule.x0_hat(x_t, network_output(schedule, x_t, x_0, k), k), x_0, rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_probs_equal_torch_distributions(reduction: str) -> None:
    schedule = Schedule.from_diffusers(stable_diffusion(), 50)
    x_t, x_next, output = data(1), data(2), data(3)
    for k in (0, 25, 49):
        forward = torch.distributions.Normal(schedule.step_mean(x_t, output, k), schedule.sigma[k]).log_prob(x_next)
        backward = torch.distributions.Normal(schedule.noising_x[k] * x_next, schedule.noising_std[k]).log_prob(x_t)
        reduce = torch.sum if reduction == "sum" else torch.mean
        log_pf = schedule.log_pf(x_t, x_next, output, k, reduction)  # type: ignore[arg-type]
        log_pb = schedule.log_pb(x_t, x_next, k, reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(log_pf, reduce(forward.flatten(1), 1), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(log_pb, reduce(backward.flatten(1), 1), rtol=1e-12, atol=1e-9)


def test_eta_one_is_the_ddpm_posterior() -> None:
    """sigma^2 is (1 - ab_next) / (1 - ab_t) * beta, and a step equals that of diffusers' DDIM scheduler."""
    scheduler = stable_diffusion()
    schedule, x_t, output = Schedule.from_diffusers(scheduler, 50), data(1), data(2)
    scheduler.set_timesteps(50)
    for k in (0, 25, 49):
        noise = data(3)
        ours = schedule.sample_next(x_t, output, noise, k)
        theirs = scheduler.step(output, int(schedule.timesteps[k]), x_t, eta=1.0, variance_noise=noise)
        # diffusers keeps alphas_cumprod in float32.
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(schedule.x0_hat(x_t, output, k), theirs.pred_original_sample, rtol=2e-5, atol=1e-4)


def test_per_sample_k_equals_int_k() -> None:
    schedule = Schedule.from_diffusers(stable_diffusion(), 50)
    x_t, x_next, output, ks = data(1), data(2), data(3), torch.tensor([0, 25, 49])
    together = schedule.log_pf(x_t, x_next, output, ks)
    alone = [schedule.log_pf(x_t[i : i + 1], x_next[i : i + 1], output[i : i + 1], int(k)) for i, k in enumerate(ks)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, steps_offset=1),
        DDPMScheduler(**SD, clip_sample=False),
        DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing"),
    ],
)
def test_a_deterministic_last_step_ends_the_chain_before_it(scheduler: DDIMScheduler) -> None:
    schedule = Schedule.from_diffusers(scheduler, 10)
    assert schedule.final is not None
    assert schedule.num_transitions == 9 == len(schedule.sigma)
    assert bool((schedule.sigma > 0).all())
    x_t, output = data(1).float(), data(2).float()
    k_table = Schedule.from_diffusers(stable_diffusion(), 10)
    assert k_table.final is None
    assert schedule.final(x_t, output).isfinite().all()


def test_final_step_is_x0_hat_when_the_chain_ends_clean() -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    schedule = Schedule.from_diffusers(scheduler, 10)
    scheduler.set_timesteps(10)
    x_t, output = data(1), data(2)
    expected = scheduler.step(output, 1, x_t, eta=0.0).pred_original_sample
    assert schedule.final is not None
    torch.testing.assert_close(schedule.final(x_t, output).double(), expected, rtol=1e-5, atol=1e-5)


def test_output_of_recovers_the_network_output() -> None:
    schedule, x_t, output, noise = Schedule.from_diffusers(stable_diffusion(), 50), data(1), data(2), data(3)
    for k in (0, 25, 49):
        x_next = schedule.sample_next(x_t, output, noise, k)
        torch.testing.assert_close(schedule.output_of(x_t, x_next, noise, k), output, rtol=1e-9, atol=1e-9)


def test_policy_kl_equals_torch_distributions() -> None:
    schedule, x_t, output, reference = (
        Schedule.from_diffusers(stable_diffusion(), 50),
        data(1),
        data(2),
        data(3),
    )
    for k in (0, 49):
        ours, theirs = (
            torch.distributions.Normal(schedule.step_mean(x_t, o, k), schedule.sigma[k]) for o in (output, reference)
        )
        expected = torch.distributions.kl_divergence(ours, theirs).flatten(1).sum(1)
        ks = torch.full((len(x_t),), k)
        found = schedule.transition_log_probs(x_t, x_t, output, ks, output_ref=reference)
        assert found.kl is not None
        torch.testing.assert_close(found.kl, expected, rtol=1e-9, atol=0)
        assert torch.equal(schedule.policy_kl(output, reference, k), found.kl)


def test_gradients_reach_the_network_output_alone() -> None:
    schedule = Schedule.from_diffusers(stable_diffusion(), 50)
    x_t, x_next, output = (data(i).requires_grad_() for i in range(3))
    schedule.log_pf(x_t, x_next, output, 3).sum().backward()
    assert x_t.grad is None
    assert x_next.grad is None
    torch.autograd.gradcheck(lambda o: schedule.log_pf(x_t, x_next, o, 3), (output,))
    assert output.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_states_are_computed_in_float32(dtype: torch.dtype) -> None:
    """The error against float64 on the same rounded inputs is at most twice that of plain float32 PyTorch."""
    exact, on_device = (Schedule.from_diffusers(stable_diffusion(), 50) for _ in range(2))
    on_device = on_device.to("cpu")
    x_t, x_next, output = (data(i).to(dtype) for i in range(3))
    for k in (0, 49):
        ours = on_device.log_pf(x_t, x_next, output, k)
        assert ours.dtype == torch.float32
        reference = exact.log_pf(x_t.double(), x_next.double(), output.double(), k)
        mean = exact.step_mean(x_t.float(), output.float(), k)
        plain = torch.distributions.Normal(mean, exact.sigma[k].float()).log_prob(x_next.float()).flatten(1).sum(1)
        assert float((ours - reference).abs().max()) <= 2 * float((plain - reference).abs().max()) + 1e-6 * float(
            reference.abs().max()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 50, "eta": 0.0}, "no density"),
        ({"num_steps": 50, "eta": -1.0}, "no density"),
        ({"num_steps": 1001}, "1 to 1000"),
        ({"num_steps": 0}, "1 to 1000"),
        ({"num_steps": 50, "eta": 3.0}, "eta <= 1"),
    ],
)
def test_impossible_chains_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_diffusers(stable_diffusion(), **arguments)  # type: ignore[arg-type]


def test_multistep_schedulers_are_refused() -> None:
    with pytest.raises(ValueError, match="DDIMScheduler"):
        Schedule.from_diffusers(PNDMScheduler(**SD, steps_offset=1), 10)


def test_unknown_prediction_type_is_refused() -> None:
    levels = Levels.of_alpha_bars(torch.tensor([9, 1]), torch.tensor([0.5, 0.9, 0.99]))
    with pytest.raises(ValueError, match="known: epsilon"):
        Schedule.from_levels(levels, "flow")


# -- flow matching ---------------------------------------------------------------------------------------------------

# Values at some of 28 steps of Stable Diffusion 3.5's grid as its pipeline's default makes it (the last two levels differ from
# ours), computed apart from this code: s_t, mean_x, mean_output, sigma, r, c of a step from the level before.
PUBLISHED_GRID = {
    0: (1.0, 0.98738, 0.01262, -0.01262, 0.98738, 0.0, 1.0),
    1: (0.98738, 0.97411, 0.49427, -0.01966, 0.85411, 0.48738, 0.86575),
    14: (0.73706, 0.70728, 0.90238, -0.05545, 0.35855, 0.89827, 0.37364),
    25: (0.19983, 0.11091, 0.94449, -0.13334, 0.09608, 0.89999, 0.17311),
    26: (0.11091, 0.00893, 0.99172, -0.10934, 0.00891, 0.89710, 0.11062),
}


@pytest.mark.parametrize("k", PUBLISHED_GRID)
def test_coefficients_of_a_flow(k: int) -> None:
    s_t, s_next, *expected = PUBLISHED_GRID[k]
    noise = torch.tensor([s_t, s_next, 0.0], dtype=torch.float64)
    schedule = Schedule.from_levels(Levels(1000 * noise[:-1], 1 - noise, noise), "velocity")
    names = ("mean_x", "mean_output", "sigma", "noising_x", "noising_std")
    # The levels above are rounded to five decimals; their ratios magnify that where signal or noise is small.
    tolerance = 1e-5 * (1 + 0.5 / (1 - s_next) + 0.5 / s_next)
    assert [float(getattr(schedule, name)[0]) for name in names] == pytest.approx(expected, rel=0, abs=tolerance)
    assert schedule.final is not None
    assert (schedule.final.mean_x, schedule.final.mean_output) == (1.0, pytest.approx(-s_next))


@pytest.mark.parametrize("config", [SD3, FLUX, {"shift": 1.0}])
def test_the_levels_are_those_of_diffusers(config: dict[str, object]) -> None:
    """diffusers shifts the levels that it is given once; FLUX's pipeline gives it ours."""
    levels = Levels.of_flow(config, 10, tokens=1024)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    is_dynamic = "use_dynamic_shifting" in config
    mu = {"mu": 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)} if is_dynamic else {}
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)], **mu)
    torch.testing.assert_close(levels.noise.float(), scheduler.sigmas, rtol=0, atol=2e-7)
    torch.testing.assert_close(levels.timesteps.float(), scheduler.timesteps, rtol=0, atol=2e-4)
    assert torch.equal(Levels.of_flow(config, 10, tokens=256, shift=3.0).noise, Levels.of_flow(SD3, 10, 1024).noise)


def test_without_noise_a_step_is_eulers() -> None:
    """eta -> 0, and the last step, against the scheduler's own."""
    schedule, scheduler = flow(SD3, 10, eta=1e-9), FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    x_t, output = data(1), data(2)
    for k in range(9):
        ours = schedule.step_mean(x_t, output, k)
        theirs = x_t + (scheduler.sigmas[k + 1] - scheduler.sigmas[k]) * output
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert schedule.final is not None
    torch.testing.assert_close(
        schedule.final(x_t, output), (x_t - scheduler.sigmas[9] * output).float(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("eta", [0.3, 0.495, 1.0])
def test_steps_keep_signal_and_noise(eta: float) -> None:
    """From x_t = a x_0 + s eps, a perfect step leads to a state with exactly the next signal and the next noise."""
    for schedule in (flow(SD3, eta=eta), Schedule.from_diffusers(stable_diffusion(), 50, eta)):
        zero, one = torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE, dtype=torch.float64)
        for k in range(schedule.num_transitions):
            a, s = schedule.signal_t[k], schedule.noise_t[k]
            # The step is linear: its effect on x_0 = 1 without noise, and on eps = 1 without data.
            outputs = {"velocity": (-one, one), "epsilon": (zero, one)}[schedule.prediction_type]
            of_data = schedule.step_mean(a * one, outputs[0], k)
            of_noise = schedule.step_mean(s * one, outputs[1], k)
            torch.testing.assert_close(of_data, schedule.signal_next[k] * one, rtol=0, atol=1e-13)
            variance = of_noise.square() + schedule.sigma[k].square()
            torch.testing.assert_close(variance, schedule.noise_next[k].square() * one, rtol=0, atol=1e-13)


def test_a_flow_is_a_diffusion_in_stretched_coordinates() -> None:
    """With x / sqrt(a^2 + s^2) for x and a^2 / (a^2 + s^2) for alpha_bar, the chain of a flow has DDIM's coefficients."""
    levels = Levels.of_flow(SD3, 28, tokens=1024)
    norm = (levels.signal**2 + levels.noise**2).sqrt()
    stretched = Levels.of_alpha_bars(levels.timesteps, (levels.signal / norm) ** 2)
    ours, theirs = flow(SD3), Schedule.from_levels(stretched, "sample")
    before, after = norm[:-2], norm[1:-1]
    x0_hat = data(3)
    for k in range(ours.num_transitions):
        x_t = data(4)
        output = (x_t - x0_hat) / ours.noise_t[k]  # the velocity that points at x0_hat
        mean = theirs.step_mean(x_t / before[k], x0_hat, k)
        torch.testing.assert_close(ours.step_mean(x_t, output, k) / after[k], mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.sigma / after, theirs.sigma, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.noising_x * after / before, theirs.noising_x, rtol=1e-12, atol=1e-15)


def test_flow_grpos_noise_is_ours_for_small_steps() -> None:
    """Its steps by their published formula, with a = 0.7; and eta = 0.7 / sqrt(2) gives our posterior's noise as h -> 0."""
    eta = 0.7 / 2**0.5
    schedule = flow(SD3, 10, eta, "flow_grpo")
    s, s_next = schedule.noise_t, schedule.noise_next
    x_t, output = data(1), data(2)
    for k in range(schedule.num_transitions):
        std = 0.7 * (s[k] / (1 - (s[1] if k == 0 else s[k]))).sqrt()
        dt = s_next[k] - s[k]
        mean = x_t * (1 + std**2 / (2 * s[k]) * dt) + output * (1 + std**2 * (1 - s[k]) / (2 * s[k])) * dt
        torch.testing.assert_close(schedule.step_mean(x_t, output, k), mean, rtol=0, atol=1e-12)
        assert float(schedule.sigma[k]) == pytest.approx(float(std * (-dt).sqrt()), rel=1e-12)
    coarse, fine = (
        float((flow({"shift": 1.0}, n, eta, "flow_grpo").sigma / flow({"shift": 1.0}, n, eta).sigma)[n // 2] - 1)
        for n in (100, 1000)
    )
    assert 0 < fine < 0.01 and coarse == pytest.approx(10 * fine, rel=0.05), "they agree to first order in the step"
    with pytest.raises(ValueError, match="flow_grpo"):
        Schedule.from_levels(Levels.of_diffusion(stable_diffusion(), 10), "epsilon", 0.5, "flow_grpo")


def test_grids_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        Levels.of_flow({"use_karras_sigmas": True}, 10, tokens=256)
    with pytest.raises(ValueError, match="1 to 1000"):
        Levels.of_flow({}, 1001, tokens=256)


def test_the_scheduler_is_left_alone() -> None:
    scheduler = stable_diffusion()
    before = scheduler.timesteps.clone()
    Schedule.from_diffusers(scheduler, 10)
    assert torch.equal(scheduler.timesteps, before)
