"""Searches on a Gaussian chain whose tilted law is known: x_0 is N(0, 1) and its reward is itself.

Each step is x' = RHO x + sqrt(1 - RHO^2) z, so that the expected end of a chain is RHO^(T - k) x_k.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dag.recipe.load import checked
from dag.recipe.search_sections import SearchRecipe
from dag.steering import feynman_kac
from dag.steering.feynman_kac import Weighing, best_of_n, steer
from dag.steering.found import Found
from dag.steering.particles import Ends, Particles
from dag.steering.stepwise import choose_stepwise
from dag.steering.weights import effective_size, log_mean_exp, systematic

T, RHO = 6, 0.7


class Chain(Particles):
    """Particles of a linear chain without a network, with states (B,)."""

    schedule = cast(Any, SimpleNamespace(num_transitions=T))

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def start(self, ids: Tensor) -> Tensor:
        return torch.randn(len(ids), generator=self.generator)

    def outputs(self, x: Tensor, k: int) -> Tensor:
        return RHO * x

    def step(self, x: Tensor, outputs: Tensor, k: int, ids: Tensor) -> Tensor:
        return outputs + math.sqrt(1 - RHO**2) * torch.randn(len(x), generator=self.generator)

    def look(self, x: Tensor, outputs: Tensor, k: int) -> Tensor:
        return RHO ** (T - k) * x

    def finish(self, x: Tensor) -> Ends:
        return Ends(x, x)


def recipe(**search: Any) -> SearchRecipe:
    data = {
        "model": {"path": "embedded"},
        "sampler": {"steps": T},
        "prompts": {"texts": ["a cat"]},
        "reward": {"name": "colourfulness"},
        "search": search,
    }
    return checked(SearchRecipe, data, "test")


def many(search: Callable[..., Found], count: int, **section: Any) -> list[Found]:
    """The results of so many searches, each with its own noise."""
    made = recipe(**section)
    return [
        search(made, Chain(seed), torch.arange, torch.Generator().manual_seed(count + seed)) for seed in range(count)
    ]


def mean(found: list[Found]) -> float:
    return sum(one.reward for one in found) / len(found)


# -- weights ------------------------------------------------------------------------------------------------------


def test_systematic_resampling_keeps_each_particle_as_often_as_it_weighs() -> None:
    generator, log_weights = torch.Generator().manual_seed(0), torch.tensor([0.1, 0.0, 0.55, 0.35]).log()
    counts = torch.stack([torch.bincount(systematic(log_weights, generator), minlength=4) for _ in range(4000)])
    expected = torch.tensor([0.4, 0.0, 2.2, 1.4])
    assert torch.equal(counts.amin(0), expected.floor().long())
    assert torch.equal(counts.amax(0), expected.ceil().long())
    torch.testing.assert_close(counts.float().mean(0), expected, atol=0.03, rtol=0)


def test_large_weights_do_not_overflow() -> None:
    log_weights = torch.tensor([2000.0, 2000.0, 0.0])
    assert log_mean_exp(log_weights) == pytest.approx(2000 + math.log(2 / 3))
    assert effective_size(log_weights) == pytest.approx(2)
    assert sorted(systematic(log_weights, torch.Generator().manual_seed(0)).tolist())[-1] == 1


# -- Feynman-Kac steering -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["adaptive", "always"])
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_the_mean_weights_estimate_z_without_bias(potential: str, resample: str) -> None:
    """Z = E[exp(x)] = e^(1/2), whatever the particles are weighed by on the way."""
    found = many(steer, 600, name="fk", particles=8, potential=potential, resample=resample)
    ratios = torch.tensor([math.exp(one.details["log_z"] - 0.5) for one in found])
    error = float(ratios.std()) / math.sqrt(len(ratios))
    print(f"\n{potential}, {resample}: Z estimated / Z {float(ratios.mean()):.3f} +- {error:.3f}", end="")
    assert abs(float(ratios.mean()) - 1) < 3 * error
    assert error < 0.05


def test_carried_weights_reach_the_tilted_mean_and_forgotten_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law x e^x has mean 1. Published code forgets the weights whenever it does not resample."""
    chosen = {"name": "fk", "particles": 32, "choose": "weighted"}
    carried = mean(many(steer, 400, **chosen))
    always = mean(many(steer, 400, **chosen, resample="always"))

    class Forgetting(Weighing):
        def resampled(self, generator: torch.Generator) -> Tensor | None:
            kept = super().resampled(generator)
            self.log_weights = torch.zeros_like(self.log_weights)
            return kept

    monkeypatch.setattr(feynman_kac, "Weighing", Forgetting)
    forgotten = mean(many(steer, 400, **chosen))
    print(
        f"\nmean of the chosen: carried {carried:.2f}, always resampled {always:.2f}, forgotten {forgotten:.2f}", end=""
    )
    assert carried == pytest.approx(1, abs=0.15)
    assert always == pytest.approx(1, abs=0.15)
    assert forgotten < 0.7


def test_states_outside_the_window_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def look(self: Chain, x: Tensor, outputs: Tensor, k: int) -> Tensor:
        seen.append(k)
        return torch.zeros(len(x))

    monkeypatch.setattr(Chain, "look", look)
    many(steer, 1, name="fk", every=2, window=[1, 5])
    assert seen == [1, 3]


# -- the best, and choices in each step ---------------------------------------------------------------------------


@pytest.mark.parametrize(("particles", "gain"), [(1, 0.0), (4, 1.03), (16, 1.77), (64, 2.34)])
def test_the_best_of_n_gains_what_order_statistics_say(particles: int, gain: float) -> None:
    found = mean(many(best_of_n, 2000, name="best_of_n", particles=particles))
    print(f"\nbest of {particles}: {found:.2f}", end="")
    assert found == pytest.approx(gain, abs=0.07)


def test_without_a_preference_the_choice_in_each_step_is_plain_sampling() -> None:
    rewards = torch.tensor([one.reward for one in many(choose_stepwise, 1500, name="svdd", proposals=4, alpha=1e6)])
    assert float(rewards.mean()) == pytest.approx(0, abs=0.1)
    assert float(rewards.std()) == pytest.approx(1, abs=0.1)


def test_the_best_proposal_of_each_step_adds_up() -> None:
    """Each step gains what the best of four Gaussian proposals does, as far as it reaches the end."""
    step = 1.03 * math.sqrt(1 - RHO**2)
    expected = step * sum(RHO ** (T - 1 - k) for k in range(T))
    assert mean(many(choose_stepwise, 1500, name="svdd", proposals=4)) == pytest.approx(expected, abs=0.1)
    windowed = step * sum(RHO ** (T - 1 - k) for k in range(2))
    assert mean(many(choose_stepwise, 1500, name="svdd", proposals=4, window=[0, 2])) == pytest.approx(
        windowed, abs=0.1
    )


def test_beams_are_dropped_down_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    step = Chain.step

    def counted(self: Chain, x: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x))
        return step(self, x, *rest)

    monkeypatch.setattr(Chain, "step", counted)
    alone = mean(many(choose_stepwise, 400, name="svdd", proposals=4))
    rows.clear()
    beams = many(choose_stepwise, 400, name="svdd", proposals=4, beams=8)
    assert rows[:T] == [32, 24, 16, 12, 8, 4]
    assert mean(beams) > alone + 0.2
    rows.clear()
    many(choose_stepwise, 200, name="svdd", proposals=9, fewer=2)
    first, last = ([rows[step] for step in range(k, len(rows), T)] for k in (0, T - 1))
    assert set(first) == {2}, "step 0 is never drawn for the full number"
    assert set(last) == {2, 9} and last.count(9) > 150
