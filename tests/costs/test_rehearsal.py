"""The training loop on the meta device in the place of a GPU: no transition waits for the GPU, and no devices are mixed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dag.costs.fake_gpu import DeviceMismatchError, FakeGpu
from dag.costs.live_bytes import as_on_cuda
from dag.costs.memory import META, Simulation
from dag.costs.rehearsal import rehearse
from dag.recipe import Recipe
from dag.recipe.load import load
from dag.run.folder import RunFolder
from dag.run.gpu import GIB
from dag.training.one_pass import OnePass
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]
# A reward whose network runs on the device.
TOWER = {"name": "image_text", "path": "random"}
ONE_PASS = {"train": {"rollout": "one_pass"}}


def small(make_recipe: MakeRecipe, **sections: Any) -> Recipe:
    """A recipe in half precision on the smallest model."""
    recipe = make_recipe(**sections)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bf16"})})


# -- the guard ----------------------------------------------------------------------------------------------------


def test_the_24_gb_recipe_asks_little_of_a_gpu() -> None:
    """One transition of the real training loop, with gradients, optimizer states and the reward network."""
    found = rehearse(load(ROOT / "recipes/aesthetic_24gb.yaml"))
    assert found.launches <= 3000, found.transition.kernels
    assert found.transition.host_copies == {}
    # Copies of sample ids, of the final pictures to the reward and its values back, and one check of all rewards.
    assert found.per_tile.host_copies.total() <= 4, found.per_tile.host_copies
    assert found.peak <= 14 * GIB


DB = {"name": "dag_db", "beta": {"value": 20.0}}
KL = {"name": "dag_kl", "beta": {"value": 20.0}}
WITHOUT_COPIES: list[dict[str, Any]] = [
    {"reward": TOWER},
    {"reward": TOWER, **ONE_PASS},
    {**ONE_PASS, "objective": {**DB, "prior": "pretrained"}, "sampler": {"uncond": "frozen"}},
    {**ONE_PASS, "objective": {**KL, "baseline": "running", "forward_looking": {"stride": 2}}},
    {"objective": KL, "regulariser": {"sampling": 1.0, "pretrained_kl": 1e-4}},
    {"objective": {**DB, "forward_looking": {"source": "current", "coefficients": "bf16"}}},
    {"objective": {"name": "ddpo"}, "adapter": {"kind": "full"}},
]


@pytest.mark.parametrize("changes", WITHOUT_COPIES, ids=str)
def test_a_transition_waits_for_nothing(make_recipe: MakeRecipe, changes: dict[str, Any]) -> None:
    found = rehearse(small(make_recipe, **changes))
    assert found.transition.host_copies == {}
    assert found.launches > 200


def test_a_reward_of_files_costs_one_copy_each_way(make_recipe: MakeRecipe) -> None:
    found = rehearse(small(make_recipe, **ONE_PASS, reward={"name": "compressibility"}))
    assert found.transition.host_copies == {
        "dag/rewards/pixels.py:to_bytes": 1,
        "dag/rewards/reward_sum.py:total": 1,
    }


def test_chains_in_cpu_memory_cost_a_copy_for_each_end(make_recipe: MakeRecipe) -> None:
    found = rehearse(small(make_recipe, memory={"chains": "cpu"}))
    assert found.transition.host_copies.keys() == {"dag/chain/trajectory.py:states"}
    # One copy for each end of the transition; the flow may need more.
    assert found.transition.host_copies["dag/chain/trajectory.py:states"] >= 2


def test_the_predicted_peak_is_that_of_the_step_that_trains(make_recipe: MakeRecipe) -> None:
    recipe = small(make_recipe, **ONE_PASS, reward={"name": "colourfulness"})
    recipe = recipe.model_copy(update={"kernels": "torch"})
    assert rehearse(recipe).peak == pytest.approx(Simulation(recipe).peak("one pass"), rel=0.1)


# -- that the guard finds mistakes --------------------------------------------------------------------------------


def patched(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[Any, Tensor], object]) -> None:
    """Do something with the states in every flow evaluation."""
    from dag.training.flow_fit import FlowFit

    original = FlowFit.log_F_tilde_at

    def disturbed(self: FlowFit, x_t: Tensor, prompt_id: Tensor, ks: Tensor) -> Tensor:
        disturb(self, x_t)
        return original(self, x_t, prompt_id, ks)

    monkeypatch.setattr(FlowFit, "log_F_tilde_at", disturbed)


@pytest.mark.parametrize(
    "look",
    [
        lambda flow_fit, x: float(x.sum()),
        lambda flow_fit, x: x.cpu(),
        lambda flow_fit, x: x[torch.tensor([0])],
    ],
    ids=["float()", ".cpu()", "an index on the CPU"],
)
def test_a_wait_in_a_transition_is_found(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, look: Callable[[Any, Tensor], object]
) -> None:
    patched(monkeypatch, look)
    found = rehearse(small(make_recipe, **ONE_PASS))
    assert found.host_copies >= 1


def test_a_tensor_left_on_the_cpu_is_refused(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, lambda flow_fit, x: x + torch.zeros(x.shape))
    with pytest.raises(DeviceMismatchError, match=r"aten::add of .* on meta, .* on cpu"):
        rehearse(small(make_recipe, **ONE_PASS))


def test_kernels_are_counted_and_views_are_not() -> None:
    x = torch.empty(4, 4, device=META)
    with FakeGpu() as counted, as_on_cuda():
        with counted.inside("a part"):
            (x.T.reshape(16)[2:] + 1).detach()
        x.mul_(2)
        torch.zeros(3) + 1
    # In the part: a copy, since a transposed matrix cannot be viewed as flat, and the addition.
    assert counted.counts.kernels == {"a part": 2, "rest": 1}
    assert counted.counts.host_copies == {}


def test_a_part_is_told_by_whose_method_is_called() -> None:
    class Owner:
        def work(self, x: Tensor) -> Tensor:
            return x + 1

    owner, counted = Owner(), FakeGpu()
    counted.watch(owner, "work", "work")
    with counted:
        owner.work(torch.empty(2, device=META)).neg()
    assert counted.counts.kernels == {"work": 1, "rest": 1}


def test_fused_kernels_count_once_each(make_recipe: MakeRecipe) -> None:
    pytest.importorskip("triton")
    recipe = small(make_recipe, **ONE_PASS)
    fused, plain = (
        rehearse(recipe.model_copy(update={"kernels": kernels})).transition.kernels["rest"]
        for kernels in ("auto", "torch")
    )
    assert fused < 60 < plain


def test_rewards_that_are_not_ours_are_not_called(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    raise SystemExit('called')\n")
    mine = {"name": "custom", "path": f"{tmp_path / 'mine.py'}:score"}
    found = rehearse(small(make_recipe, **ONE_PASS, reward=mine))
    assert found.host_copies == 2, "pictures there, rewards back"


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rollout", ["one_pass", "stored"])
def test_pytorch_sees_no_wait_in_a_transition_either(make_recipe: MakeRecipe, tmp_path: Path, rollout: str) -> None:
    from dag.training.build import build

    recipe = small(make_recipe, train={"rollout": rollout, "updates": 1}, sampler={"steps": 6})
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run"), build(recipe, device))
    steps = 0

    def in_the_middle(rows: int) -> None:
        nonlocal steps
        steps += 1
        is_inside = 2 <= steps % recipe.sampler.steps < recipe.sampler.steps - 1
        torch.cuda.set_sync_debug_mode("error" if is_inside else "default")

    try:
        if rollout == "one_pass":
            training, scorer = OnePass(trainer.learner, trainer.meter), trainer.sampling.scorer
            steps_left = training.steps(trainer.begin_epoch(1), trainer.sampling.batch(1), scorer, in_the_middle)
        else:
            trajectories = trainer.sample(trainer.begin_epoch(1))
            stored = StoredTraining(trainer.learner, trainer.meter)
            steps_left = stored.steps(trainer.begin_epoch(1), trajectories, on_rows=in_the_middle)
        for _ in steps_left:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps > 0
