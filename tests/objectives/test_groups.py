"""Advantages of whole trajectories: trajectory balance, groups of a prompt, and how they agree."""

from typing import Any

import pytest
import torch
from helpers.toy_gfn import Bowl, Mixture, Settings, ToyGFN
from torch import Tensor

from dag.objectives import OBJECTIVES, Objective, UpdateScalars
from dag.objectives.groups import centred
from dag.objectives.registry import clipped_surrogate
from dag.recipe import Beta, PolicyGradient, TrajectoryBalance

N, T = 12, 5


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tb(per_group: int = 1, **options: Any) -> Objective:
    return OBJECTIVES["tb"](TrajectoryBalance(name="tb", beta=Beta(value=1), **options), per_group=per_group)


def ddpo(per_group: int = 1, **options: Any) -> Objective:
    return OBJECTIVES["ddpo"](PolicyGradient(name="ddpo", **options), per_group=per_group)


def test_the_mean_of_the_others_in_a_group_is_subtracted() -> None:
    found = centred(torch.tensor([1.0, 2.0, 6.0, 10.0, 30.0, 50.0]), 3)
    assert found.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 10 - 40, 30 - 30, 50 - 20]
    assert centred(torch.tensor([1.0, 2.0, 6.0]), 1).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5], "the update is one group"
    with pytest.raises(ValueError, match="at least 2"):
        centred(torch.tensor([1.0]), 1)


@pytest.mark.parametrize("per_group", [1, 4])
def test_tbs_gradient_is_that_of_the_variance_of_its_residual(per_group: int) -> None:
    """Summed over the trajectories it is K / 2 times that of the unbiased variance in each group of K."""
    log_pf, log_pb, log_reward = values(N, T).requires_grad_(), values(N, T, seed=1), values(N, seed=2)
    e = (log_pf - log_pb).sum(1) - log_reward
    size = N if per_group == 1 else per_group
    (expected,) = torch.autograd.grad(0.5 * size * e.view(-1, size).var(1).sum(), log_pf)
    log_ratio = (log_pf - log_pb).detach()
    advantage = tb(per_group).advantages(UpdateScalars(log_ratio, log_reward))
    assert advantage is not None
    surrogate, _ = clipped_surrogate(advantage, log_pf - log_pf.detach(), 0.2)
    (ours,) = torch.autograd.grad(surrogate.sum(), log_pf)
    torch.testing.assert_close(ours, expected)


def test_all_pairs_of_a_prompt_have_the_gradient_of_the_variance() -> None:
    """PRDP's loss: the mean over all pairs of (e_i - e_j)^2 is twice the unbiased variance of e."""
    e = values(N)
    first, second = torch.triu_indices(N, N, offset=1)
    torch.testing.assert_close((e[first] - e[second]).square().mean(), 2 * e.var())


def test_at_the_pretrained_model_relative_tb_is_grpo_without_a_standard_deviation() -> None:
    """There log P_F equals the prior, and e is -beta r; GRPO's mean includes the trajectory itself."""
    reward, per_group = values(N).float(), 4
    advantage = tb(per_group).advantages(UpdateScalars(torch.zeros(N, T), reward))
    grpo = ddpo(per_group, std="none", advantage_clip=100).observe(reward, torch.zeros(N))
    assert advantage is not None and grpo is not None
    torch.testing.assert_close(advantage, (per_group / (per_group - 1) * grpo)[:, None].expand(N, T))


def test_long_sums_keep_small_differences() -> None:
    """A thousand steps of 20,000 nats each, and rewards of one nat: float32 sums would lose half of a nat."""
    log_ratio = 20_000 + values(2, 1000).float()
    exact = log_ratio.double().sum(1)
    advantage = tb().advantages(UpdateScalars(log_ratio, torch.zeros(2)))
    assert advantage is not None
    torch.testing.assert_close(advantage[:, 0].double(), exact.flip(0) - exact, rtol=1e-6, atol=0)


def test_tbs_advantages_are_clipped() -> None:
    advantage = tb(advantage_clip=2.0).advantages(UpdateScalars(torch.zeros(3, T), torch.tensor([0.0, 10.0, 1.0])))
    assert advantage is not None
    assert advantage[:, 0].tolist() == [-2.0, 2.0, -2.0]


def test_rewards_are_compared_within_groups() -> None:
    reward, prompt = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([0, 0, 1, 1])
    assert ddpo(2, std="none", advantage_clip=9).observe(reward, prompt).tolist() == [-1, 1, -5, 5]  # type: ignore[union-attr]
    in_groups = ddpo(2, std="group").observe(reward, prompt)
    assert in_groups is not None
    assert in_groups.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-4)
    overall = ddpo(2, std="all").observe(reward, prompt)
    sd = float(reward.std(correction=0))
    assert overall is not None
    assert overall.tolist() == pytest.approx([-1 / sd, 1 / sd, -5 / sd, 5 / sd], abs=1e-4)
    assert float(overall.view(2, 2).sum(1).abs().max()) < 1e-6


def test_a_floor_keeps_the_rounding_of_equal_rewards_small() -> None:
    reward, prompt = torch.tensor([0.3000001, 0.3, 0.3, 0.3]), torch.zeros(4)
    rounding, floored = (ddpo(4, std="group", std_floor=floor).observe(reward, prompt) for floor in (1e-8, 1e-4))
    assert rounding is not None and floored is not None
    assert float(rounding[0]) > 1
    assert float(floored.abs().max()) < 1e-3


@pytest.mark.parametrize(("has_prior", "mass"), [(True, 0.274), (False, 0.257)])
def test_tb_reaches_the_tilted_law_of_a_toy(has_prior: bool, mass: float) -> None:
    """Left mass of the best Gaussian steps, with the pretrained model in the target and for a density (whose own is .300)."""
    data = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), 0.25)
    target = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), 0.25)
    reward = Bowl(slope=0.45, centre=0.2) if has_prior else target
    made = ToyGFN(data, reward, torch.linspace(-3.5, 3.5, 29), 2, has_prior=has_prior)
    made.train(tb(prior="pretrained" if has_prior else "none"), Settings(iterations=300, warmup=0, policy_lr=0.05))
    found = [float((samples < 0).float().mean()) for samples in made.samples(20_000)]
    print(f"\ntb, {'prior' if has_prior else 'density'}: left mass {' '.join(f'{one:.3f}' for one in found)}", end="")
    assert found == pytest.approx([mass, mass], abs=0.012)
