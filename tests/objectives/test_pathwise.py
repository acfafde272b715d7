"""The closed forms of the policy's gradient: against autograd, where detailed balance is exact, and on a toy with a known law."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.toy_gfn import Bowl, Mixture, Settings, ToyGFN
from torch import Tensor

from dag.chain.schedule import Schedule
from dag.objectives import OBJECTIVES, Objective, pathwise
from dag.objectives.reward_critic import RewardCritic
from dag.objectives.transition import Transition
from dag.recipe import Beta, DetailedBalance, ForwardLooking, KLDivergence, NablaBalance, Recipe
from dag.run.processes import ALONE
from dag.training.critic_fit import CriticFit
from dag.training.optimizer import ClippedOptimizer

B, SHAPE = 5, (2, 3, 3)
MEAN, SLOPE = 0.7, -1.3


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    """The 50 steps of Stable Diffusion in float64."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    return Schedule.from_diffusers(scheduler, 50)


def states(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two unrelated float64 states: what holds for them holds off-policy."""
    generator = torch.Generator().manual_seed(seed)
    x_t, x_next = torch.randn(2, B, *SHAPE, generator=generator, dtype=torch.float64)
    return 1.5 * x_t, 1.5 * x_next


def point_mass(x: Tensor, alpha_bar: Tensor) -> Tensor:
    """The optimal noise prediction for data that are all equal to MEAN."""
    return (x - alpha_bar.sqrt() * MEAN) / (1 - alpha_bar).sqrt()


def log_ratio_gradient(schedule: Schedule, k: int) -> Tensor:
    """() d/dx log G(x_k), with G the flow over the pretrained marginal, for data N(MEAN, 1 - ab_end) and reward SLOPE x_0."""
    end = schedule.signal_next[-1].square()
    alpha_bar = torch.cat([schedule.alpha_bar_t, end[None]])[k]
    return (alpha_bar / end).sqrt() * (1 - end) / (1 - alpha_bar) * SLOPE


def kl_to(schedule: Schedule, k: int, x_t: Tensor, output: Tensor, target: pathwise.Target) -> Tensor:
    found = schedule.transition_log_probs(x_t, x_t, output, torch.full((len(x_t),), k), 1.0, target.output).kl
    assert found is not None
    return target.weight * found


@pytest.mark.parametrize("k", [0, 20, 48, 49])
@pytest.mark.parametrize("is_residual", [True, False])
def test_the_loss_has_the_gradient_of_the_steps_kl(schedule: Schedule, k: int, is_residual: bool) -> None:
    """Against autograd of E[log P_F - log P_ref - <y, x_next>], whose expectation over the noise is a formula."""
    x_t, y = states()
    output, pretrained = (2 * state for state in states(1))
    if is_residual:
        target = pathwise.against_pretrained(schedule, k, y, pretrained)
        centre, variance = schedule._mean(x_t, pretrained, k), schedule.sigma[k].square()
    else:
        target = pathwise.against_noising(schedule, k, y, x_t)
        centre, variance = x_t / schedule.noising_x[k], (schedule.noising_std[k] / schedule.noising_x[k]).square()
    output.requires_grad_(True)
    mean = schedule._mean(x_t, output, k)
    expected = ((mean - centre).square() / (2 * variance) - y * mean).sum()
    (ours,) = torch.autograd.grad(kl_to(schedule, k, x_t, output, target).sum(), output)
    (theirs,) = torch.autograd.grad(expected, output)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))


def test_residuals_of_gradients_vanish_where_the_tilted_flow_is_exact(schedule: Schedule) -> None:
    """A linear reward on Gaussian data: mu - mu_ref = sigma^2 h(x_next) forward, grad [log P_F - log P_ref] = -h(x_t) reverse."""
    x_t, x_next = states()
    for k in range(schedule.num_transitions):
        x = x_t.clone().requires_grad_(True)
        pretrained = point_mass(x, schedule.alpha_bar_t[k])
        h = log_ratio_gradient(schedule, k + 1).expand_as(x_t)
        output = pretrained + schedule.sigma[k].square() / schedule.mean_output[k] * h
        target = pathwise.against_pretrained(schedule, k, h, pretrained.detach())
        assert float(kl_to(schedule, k, x_t, output.detach(), target).max()) < 1e-8
        # The policy's own Jacobian is the pretrained one's; the shift does not depend on the state.
        reverse = pathwise.reverse_score(schedule, k, x, x_next, output, pretrained)
        residual = reverse + log_ratio_gradient(schedule, k)
        assert float(residual.abs().max()) < 1e-8 * (1 + abs(SLOPE) + float(reverse.abs().max()))


def test_residuals_of_gradients_vanish_where_the_density_flow_is_exact(schedule: Schedule) -> None:
    """Reward N(x_0; MEAN, 1 - ab_end): log F(x_k) is the noised density and the optimal noise prediction the policy."""
    x_t, x_next = states()
    for k in range(schedule.num_transitions):
        alpha_bar, following = schedule.alpha_bar_t[k], schedule.signal_next[k].square()
        x = x_t.clone().requires_grad_(True)
        output = point_mass(x, alpha_bar)
        y = -(x_next - following.sqrt() * MEAN) / (1 - following)
        target = pathwise.against_noising_pointwise(schedule, k, y, x_t, x_next)
        assert float(kl_to(schedule, k, x_t, output.detach(), target).max()) < 1e-6
        reverse = pathwise.reverse_score(schedule, k, x, x_next, output, None)
        own = -(x_t - alpha_bar.sqrt() * MEAN) / (1 - alpha_bar)
        assert float((reverse + own).abs().max()) < 1e-8 * float(reverse.abs().max())


# -- the law of a trained chain -----------------------------------------------------------------------------------

DATA = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.25)
TILT = Bowl(slope=0.45, centre=0.2)
# For a policy that learns no flow, and for one that must not be faster than its flow.
ALONE_SETTINGS = Settings(iterations=150, warmup=0, policy_lr=0.1)
WITH_FLOW = Settings(iterations=400, warmup=150, policy_lr=0.02)


def toy(*, looks_through_policy: bool = False) -> ToyGFN:
    made = ToyGFN(DATA, TILT, torch.linspace(-3.5, 3.5, 29), 2, has_prior=True)
    made.looks_through_policy = looks_through_policy
    made.weights = torch.ones_like(made.schedule.alpha_bar_t)
    return made


def objective(name: str, **options: Any) -> Objective:
    kinds = {"dag_db": DetailedBalance, "dag_kl": KLDivergence, "nabla_db": NablaBalance}
    looking = ForwardLooking(weight="one")
    options = {"learnt_flow": False, **options}
    section = kinds[name](name=name, beta=Beta(value=1), prior="pretrained", forward_looking=looking, **options)
    return OBJECTIVES[name](section)


def left_masses(made: ToyGFN, label: str) -> list[float]:
    """Each seed's share of samples below zero: 0.5 untrained, 0.274 for the best Gaussian steps."""
    masses = [float((samples < 0).float().mean()) for samples in made.samples(20_000)]
    print(f"\n{label:<40} left mass {' '.join(f'{mass:.3f}' for mass in masses)}", end="")
    return masses


def test_the_rewards_gradient_alone_nearly_reaches_the_tilted_law() -> None:
    """nabla-DB without attenuation and without a flow: 0.26 to 0.27 of 0.274, by the reward of the pretrained x0_hat."""
    made = toy()
    made.train(objective("nabla_db"), ALONE_SETTINGS)
    assert all(0.25 < mass < 0.29 for mass in left_masses(made, "nabla_db"))


@pytest.mark.slow
def test_the_published_attenuation_and_the_policys_own_x0_hat_tilt_too_little() -> None:
    """0.38 with alpha_bar, 0.34 with the trained policy's x0_hat, which has moved towards the reward already."""
    attenuated, own = toy(), toy(looks_through_policy=True)
    attenuated.weights = attenuated.schedule.alpha_bar_t
    # The policy moves while it looks through itself, so that it needs longer.
    longer = replace(ALONE_SETTINGS, iterations=300)
    for made, label, mass, settings in (
        (attenuated, "nabla_db, alpha_bar", 0.38, ALONE_SETTINGS),
        (own, "nabla_db, own x0_hat", 0.34, longer),
    ):
        made.train(objective("nabla_db"), settings)
        assert left_masses(made, label) == pytest.approx([mass, mass], abs=0.03)


def test_with_a_learnt_flow_the_pathwise_gradient_reaches_the_best_gaussian_steps() -> None:
    made = toy(looks_through_policy=True)
    made.weights = made.schedule.alpha_bar_t
    made.train(objective("dag_kl", policy_gradient="pathwise", learnt_flow=True, huber=5), WITH_FLOW)
    assert left_masses(made, "dag_kl pathwise") == pytest.approx([0.274, 0.274], abs=0.012)


def black_box(x: Tensor) -> Tensor:
    """The tilt's log reward (N,), which autograd cannot see."""
    return TILT.log_prob(x.detach())


@pytest.mark.slow
def test_a_learnt_gradient_of_a_black_box_leads_to_the_same_law(make_recipe: Callable[..., Recipe]) -> None:
    made = toy()
    recipe = make_recipe(reward_critic={"width": 8, "passes": 3})
    critic = RewardCritic((1, 1, 1), torch.zeros(1, 1, 1), recipe.reward_critic.width)
    optimizer = ClippedOptimizer("critic", torch.optim.AdamW(critic.parameters(), 5e-3), 1.0)
    learnt = CriticFit(critic, optimizer, recipe, ALONE)

    def value(x: Tensor) -> Tensor:
        scaled = critic(x[:, :, None, None], torch.zeros(len(x), dtype=torch.int64))
        return learnt.mean + learnt.sd * scaled

    made.stand_in, parts = value, 8
    for part in range(parts):
        x = made.rollout(64).states[-1]
        previews = torch.stack([x + 0.5 * torch.randn_like(x), x], 1)[..., None, None]
        reward = black_box(previews.view(-1, 1)).view(-1, 2)
        learnt.learn(previews, reward, torch.zeros(len(reward), dtype=torch.int64))
        rate = ALONE_SETTINGS.policy_lr * min(1.0, 2 * (1 - part / parts))
        settings = Settings(iterations=20, warmup=0, policy_lr=rate, decay=False, batch=64)
        made.train(objective("dag_kl", policy_gradient="pathwise"), settings)
    assert all(0.24 < mass < 0.31 for mass in left_masses(made, "dag_kl, learnt gradient"))


@pytest.mark.slow
def test_the_control_variate_corrects_a_wrong_gradient() -> None:
    """The stand-in knows half of the reward, and a wave that is not there. Alone it leads to 0.35."""

    def wrong(x: Tensor) -> Tensor:
        return 0.5 * TILT.log_prob(x) + 0.2 * torch.sin(4 * x[:, 0])

    found = {}
    for kind in ("pathwise", "control_variate"):
        made = toy()
        made.stand_in = wrong
        made.train(objective("dag_kl", policy_gradient=kind), ALONE_SETTINGS)
        found[kind] = left_masses(made, f"dag_kl {kind}, wrong gradient")
    assert all(0.24 < mass < 0.31 for mass in found["control_variate"])
    assert all(mass > 0.32 for mass in found["pathwise"])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["dag_db", "dag_kl"])
def test_the_control_variate_is_unbiased_and_has_less_noise_than_the_score(name: str, reduction: str) -> None:
    """One step from one state, many draws: each objective's gradient of the mean against quadrature; prints the variances.

    The flow is not what is differentiated, which knows the bowl to 80 % and nothing of the wave.
    """
    schedule, k, draws, D = toy().schedule, 4, 100_000, 2
    factor = 1.0 if reduction == "sum" else 1 / D
    sigma, b = (column[k].double() for column in (schedule.sigma, schedule.mean_output))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(draws, D, generator=generator, dtype=torch.float64)
    x_t, output = torch.full((draws, D), 0.4, dtype=torch.float64), torch.full((draws, D), 0.1, dtype=torch.float64)
    output.requires_grad_(True)
    mean = (schedule.mean_x[k].double() * x_t + b * output.detach())[0]

    def log_F(x: Tensor) -> Tensor:
        return TILT.log_prob(x) + torch.tanh(3 * x).sum(1)

    def known(x: Tensor) -> Tensor:
        return 0.8 * TILT.log_prob(x)

    x_next = (mean + sigma * z).requires_grad_(True)
    (y,) = torch.autograd.grad(known(x_next).sum(), x_next)
    x_next = x_next.detach()
    pretrained = output.detach()  # the KL's own gradient is zero there, so that the flow's alone is left
    target = pathwise.against_pretrained(schedule, k, y / factor, pretrained)
    log_pf = factor * schedule.log_pf(x_t, x_next, output, k)
    zero = torch.zeros(draws)
    transition = Transition(
        k=torch.full((draws,), k),
        is_terminal=torch.zeros(draws, dtype=torch.bool),
        log_pf=log_pf,
        log_pf_old=log_pf.detach(),
        log_pb=zero,
        log_reward=zero,
        pathwise=factor**2 * kl_to(schedule, k, x_t, output, target),
        unexplained=log_F(x_next) - known(x_next),
    )
    chosen = objective(name, policy_gradient="control_variate", log_prob_reduction=reduction)
    (found,) = torch.autograd.grad(chosen(transition).loss.sum(), output)
    scale = -factor * b / sigma * (2 if name == "dag_db" else 1)  # of a score function: grad log P_F is b z / sigma
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    weight = torch.exp(-0.5 * grid.square()) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    exact = float(scale * (weight * log_F(mean[:1] + sigma * grid)[:, None] * grid).sum())
    score, first = scale * (log_F(x_next))[:, None] * z, found[:, 0]
    error = float(first.std()) / math.sqrt(draws)
    print(f"\n{name} {reduction}: exact {exact:.4f}, found {float(first.mean()):.4f} +- {error:.4f}, variance "
          f"{float(score[:, 0].var() / first.var()):.1f} times less than the score's", end="")  # fmt: skip
    assert float(first.mean()) == pytest.approx(exact, abs=4 * error)
    assert score[:, 0].var() > 1.5 * first.var()
    known_alone = float(-factor * b * (2 if name == "dag_db" else 1) * y[:, 0].mean())
    assert abs(known_alone - exact) > 20 * error, "the known part alone is biased"
