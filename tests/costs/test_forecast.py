"""Predicted memory against the bytes of tensors that are counted while the embedded model really trains."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import one_pass, parts_of, sampled, updated
from torch import Tensor

import train_dag
from dag.costs.forecast import LEVERS, forecast, savings
from dag.costs.live_bytes import LiveBytes
from dag.costs.memory import Simulation
from dag.costs.weightless import optimizer_states
from dag.recipe import Recipe
from dag.recipe.load import load, parse
from dag.run.folder import RunFolder
from dag.training.optimizer import build_optimizer
from dag.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
BASE: dict[str, dict[str, Any]] = {
    "model": {"path": "embedded", "resolution": 32},
    # The layouts of convolutions are predicted as on CUDA, where norms and channels-last convolutions copy more than on a CPU.
    "memory": {"channels_last": False},
    "sampler": {"steps": 2, "guidance_scale": 3.0, "tile": 4},
    "prompts": {"texts": ["a cat", "a dog"]},
    "reward": {"name": "colourfulness"},
    "objective": {"name": "dag_db", "beta": {"value": 20.0}},
    "flow": {"channels": [32, 64, 64], "warmup_epochs": 0},
    "train": {"epochs": 2, "trajectories": 4, "updates": 1, "micro_batch": 4},
    "evaluation": {"prompts": 2, "images_per_prompt": 2},
}
ONE_PASS = {"rollout": "one_pass"}
PATHWISE: dict[str, Any] = {"name": "dag_kl", "beta": {"value": 20.0}, "policy_gradient": "pathwise"}
NABLA: dict[str, Any] = {"name": "nabla_db", "beta": {"value": 20.0}}
LEARNT: dict[str, Any] = {**PATHWISE, "prior": "pretrained", "learnt_flow": False, "reward_gradient": "learnt"}
# Its fit needs a fifth more than the update of the policy, so that a forecast without it is wrong.
WIDE: dict[str, Any] = {"reward_critic": {"width": 384, "passes": 1}, "flow": {"warmup_epochs": 1}}


def shallow(model: Path) -> dict[str, Any]:
    """The section of a model on which what is counted has fewer operations."""
    return {"path": str(model), "resolution": 16}


def recipe_of(change: dict[str, Any]) -> Recipe:
    sections = {name: {**BASE.get(name, {}), **change.get(name, {})} for name in BASE | change}
    if sections["objective"]["name"] in ("ddpo", "dpo"):
        del sections["objective"]["beta"]
    # On a CPU norms are PyTorch's; fused ones, as on a GPU, keep fewer tensors.
    return parse({**sections, "kernels": "torch"}, "test recipe")


def measured(recipe: Recipe, run: RunFolder) -> dict[str, int]:
    """Peak bytes of each phase in a second epoch, when gradients and optimizer states are in memory."""
    trainer = Trainer(recipe, run, parts_of(recipe))
    peaks: dict[str, int] = {}

    def uncounted(name: str, call: Callable[[], Any], *others: Tensor) -> Any:
        return call()

    def counted(name: str, call: Callable[[], Any], *others: Tensor) -> Any:
        with LiveBytes() as live:
            live.include([*trainer.components.standing(), *others])
            result = call()
        peaks[name] = live.peak
        return result

    if recipe.train.rollout == "one_pass" and recipe.warmup_epochs > 0:
        updated(trainer, sampled(trainer, 0), 0)
        counted("warm-up rollout", lambda: sampled(trainer, 0))
    for phase in (uncounted, counted):
        if recipe.train.rollout == "one_pass":
            phase("one pass", lambda: one_pass(trainer, 1))
            continue
        trajectories = phase("rollout", lambda: sampled(trainer, 1))
        phase("update", partial(updated, trainer, trajectories, 1), trajectories.chain)
    counted("evaluation", trainer.evaluate)
    return peaks


# In float32, since half precision is predicted as on CUDA, where norms keep more tensors than on a CPU.
CHANGES: list[dict[str, Any]] = [
    {},
    {"memory": {"checkpointing": "full"}},
    {"sampler": {"tile": 3, "chain_dtype": "fp16"}, "objective": {"prior": "pretrained"}},
    {"sampler": {"uncond": "frozen"}},
    {"regulariser": {"pretrained_kl": 1e-4, "sampling": 1.0}},
    {"adapter": {"rank": 32, "targets": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]}},
    {"adapter": {"kind": "full"}, "train": {"optimizer": "adamw8bit"}},
    {"adapter": {"kind": "full"}, "memory": {"checkpointing": "full"}, "train": ONE_PASS},
    {"train": ONE_PASS, "memory": {"checkpointing": "selective"}},
    {"train": ONE_PASS, "sampler": {"uncond": "frozen"}, "objective": {"prior": "pretrained"}},
    {"objective": {"forward_looking": {"decoder": "half"}}, "train": {**ONE_PASS, "micro_batch": 4}},
    {"objective": {"forward_looking": {"source": "current", "prediction": "conditional"}}},
    {"objective": {"name": "ddpo"}},
    {"objective": PATHWISE},
    {"objective": {**PATHWISE, "prior": "pretrained", "learnt_flow": False}, "memory": {"checkpointing": "full"}},
    {"objective": PATHWISE, "memory": {"gradient_batch": 1}, "train": ONE_PASS},
    {"objective": {**NABLA, "prior": "pretrained"}},
    {"objective": {**NABLA, "prior": "pretrained"}, "train": ONE_PASS},
    {"objective": LEARNT, "memory": {"checkpointing": "full"}, "train": {"micro_batch": 1}},
    {"objective": LEARNT, "train": {"trajectories": 8}, **WIDE},
    {"objective": LEARNT, "train": {**ONE_PASS, "trajectories": 8}, **WIDE},
    {"objective": {"name": "ddpo", "baseline": "value"}, "train": {"trajectories": 8}, **WIDE},
    {"memory": {"base": "nf4"}},
    {"adapter": {"text_encoder": {"rank": 8}, "targets": []}, "train": {"micro_batch": 2}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_predicted_peaks_are_within_a_tenth_of_the_measured(
    tmp_path: Path, shallow_model: Path, change: dict[str, Any]
) -> None:
    recipe = recipe_of({"model": shallow(shallow_model), **change})
    predicted = forecast(recipe).phases
    found = measured(recipe, RunFolder.create(tmp_path / "run"))
    assert predicted.keys() == found.keys()
    for name, peak in found.items():
        print(f"{name:11} predicted {predicted[name] / 2**20:8.2f} MiB, measured {peak / 2**20:8.2f} MiB")
        assert predicted[name] == pytest.approx(peak, rel=0.1), name


def test_a_stored_update_by_the_rewards_gradient_is_counted_up_to_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step decodes by the VAE, whose graph of an SDXL's picture is larger than all else."""
    simulation, seen = Simulation(recipe_of({"objective": PATHWISE, "sampler": {"steps": 8}})), list[bool]()
    decode = simulation.made.policy.decode

    def counted(x_0: Tensor) -> Tensor:
        seen.append(x_0.requires_grad)
        return decode(x_0)

    monkeypatch.setattr(simulation.made.policy, "decode", counted)
    simulation.peak("update")
    assert True in seen


def test_in_one_pass_a_preview_is_counted_beside_the_graphs_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds a hundredth to the peak of an SD 1.5: within the tolerance above, so that nothing there would show it."""
    simulation, held = Simulation(recipe_of({"train": ONE_PASS, "sampler": {"steps": 4}})), list[bool]()
    preview, updates = simulation.made.policy.preview, simulation.made.learner.updates

    def counted(*latents: Any) -> Tensor:
        held.append(updates.policy.parameters[0].grad is not None)
        return preview(*latents)

    monkeypatch.setattr(simulation.made.policy, "preview", counted)
    simulation.peak("one pass")
    assert held == [False, False, True, True], "the third preview finds the first step's gradients"


def test_the_comparison_of_a_critic_with_the_exact_gradient_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embedded model it hides behind the update; on an SD 1.5 a picture's graph through the decoder is the peak."""
    simulation, rows = Simulation(recipe_of({"objective": LEARNT})), list[int]()
    preview = simulation.made.policy.preview

    def counted(latents: Tensor) -> Tensor:
        if latents.requires_grad:
            rows.append(len(latents))
        return preview(latents)

    monkeypatch.setattr(simulation.made.policy, "preview", counted)
    simulation.peak("update")
    assert rows == [1] * 4, "one latent of each trajectory"


def test_the_levers_that_would_help_are_named_and_their_peaks_hold(
    shallow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each lever takes seconds to count; the others are listed in the order of what they cost.
    chosen = ("checkpointing", "micro_batch", "decode_batch", "base")
    monkeypatch.setattr("dag.costs.forecast.LEVERS", [lever for lever in LEVERS if lever[1] in chosen])
    model = {"model": shallow(shallow_model)}
    recipe = recipe_of(model)
    now = forecast(recipe)
    found = dict(savings(recipe, now))
    assert {"memory.checkpointing=full", "memory.checkpointing=selective", "train.micro_batch=1"} <= found.keys()
    assert all(peak < now.peak for peak in found.values())
    pulled = recipe_of({**model, "memory": {"checkpointing": "full"}})
    peaks = forecast(pulled)
    assert peaks.peak == found["memory.checkpointing=full"]
    compared = recipe_of({"objective": {"name": "dpo", "form": "denoise"}, "prompts": {"per_group": 2}})
    names = [lever.partition("=")[0] for lever, _ in savings(compared, forecast(compared))]
    assert "memory.checkpointing" in names
    assert "train.micro_batch" not in names, "a micro-batch of one holds no group to compare"
    # Each lever costs seconds to follow.
    monkeypatch.setattr("dag.costs.forecast.LEVERS", [lever for lever in LEVERS if lever[1] == "checkpointing"])
    assert not {lever for lever, _ in savings(pulled, peaks)} & {"memory.checkpointing=full"}


def test_a_budget_refuses_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A model of the hub is not downloaded for this: an SD 1.5 with random weights is counted in its place."""
    monkeypatch.chdir(tmp_path)
    # Each costs seconds to follow; one is enough to see it named.
    monkeypatch.setattr("dag.costs.forecast.LEVERS", LEVERS[1:2])
    recipe = str(ROOT / "recipes/aesthetic_24gb.yaml")
    arguments = ["--recipe", recipe, "--out", "run", "--set", "memory.budget_gib=4"]
    assert train_dag.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: memory.budget_gib=4: the ")
    assert "GiB; levers, each alone: " in said
    assert list(tmp_path.iterdir()) == []


def test_states_of_the_optimizers_are_counted_as_they_are() -> None:
    pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4095,), (64, 64), (300, 70))]
    train = load(ROOT / "recipes/tiny_cpu_db.yaml").train
    for kind in ("adamw", "adamw8bit", "paged_adamw8bit"):
        optimizer = build_optimizer(parameters, 1e-3, train, kind)
        sum(p.square().sum() for p in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()
        names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
        held = sum(state[name].nbytes for state in optimizer.state.values() for name in names if name in state)
        assert sum(tensor.nbytes for tensor in optimizer_states(parameters, kind)) == held, kind
