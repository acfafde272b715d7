"""What the rewards along a chain say about the final one: fitted weights of the forward-looking term, informative steps."""

import pytest
import torch

from dag.objectives.look_ahead import LookAhead

N, SLOPES = 4000, (0.3, 0.8, 1.0)


def rollout(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(previews (N, 3), final rewards (N,)) such that the final reward is 1 + slope * preview + noise at each step."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(N, generator=generator, dtype=torch.float64)
    columns = []
    for slope, noise in zip(SLOPES, (1.0, 0.3, 0.0), strict=True):
        # A preview whose best prediction of the reward has this slope: cov / var = slope.
        spread = noise * torch.randn(N, generator=generator, dtype=torch.float64)
        scale = (1 / slope - noise**2) if noise**2 < 1 / slope else 0.0
        columns.append(scale * reward + spread)
    return torch.stack(columns, 1).float(), (1 + reward).float()


def test_slopes_are_those_of_least_squares() -> None:
    previews, reward = rollout()
    look = LookAhead(3)
    assert torch.equal(look.slopes(), torch.ones(3)), "before the first rollout every preview counts fully"
    look.see(previews, reward)
    for k, found in enumerate(look.slopes().tolist()):
        column = torch.stack([torch.ones(N), previews[:, k]], 1)
        line = torch.linalg.lstsq(column, reward[:, None]).solution[1]
        assert found == pytest.approx(float(line), rel=5e-3)


def test_a_second_rollout_counts_half() -> None:
    look, (previews, reward) = LookAhead(3), rollout()
    look.see(previews, reward)
    first = look.mean.clone()
    look.see(previews + 2, reward)
    assert look.mean[:3].tolist() == pytest.approx((first[:3] + 1).tolist())


def test_a_step_is_as_informative_as_its_value_jumps() -> None:
    """Previews that say nothing at first and everything from the second state on: the first step decides it all."""
    look, generator = LookAhead(3), torch.Generator().manual_seed(1)
    reward = 3 * torch.randn(N, generator=generator)
    noise = torch.randn(N, generator=generator)
    look.see(torch.stack([noise, reward, reward], 1), reward)
    assert look.informativeness().tolist() == pytest.approx([3.0, 0.0, 0.0], abs=0.15)


def test_rewards_that_do_not_vary_give_finite_numbers() -> None:
    look = LookAhead(2)
    look.see(torch.full((8, 2), 4.0), torch.full((8,), 4.0))
    assert bool(look.slopes().isfinite().all() and look.informativeness().isfinite().all())


def test_previews_that_say_nothing_get_no_weight() -> None:
    """Of 16 trajectories, slopes are noise of size 1/4; shrunk by it most are 0, and none is negative."""
    found = []
    for seed in range(50):
        look, generator = LookAhead(4), torch.Generator().manual_seed(seed)
        look.see(torch.randn(16, 4, generator=generator), torch.randn(16, generator=generator))
        found.append(look.slopes())
    slopes = torch.stack(found)
    assert float(slopes.min()) == 0.0
    assert float((slopes == 0).float().mean()) > 0.7
    assert float(slopes.mean()) < 0.08


def test_the_moments_survive_a_checkpoint() -> None:
    look, other = LookAhead(3), LookAhead(3)
    look.see(*rollout())
    other.load(look.tensors())
    assert torch.equal(other.slopes(), look.slopes())
