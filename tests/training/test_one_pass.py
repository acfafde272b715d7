"""Training in one pass against training on stored chains: the gradients must be equal."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import building
from helpers.building import disturb, one_pass, rolled_out, sampled

from dag.chain.rollout import Batch
from dag.chain.trajectory import Trajectories
from dag.errors import RunError, UsageError
from dag.recipe import Recipe
from dag.run.folder import RunFolder
from dag.training.flow_fit import FlowFit
from dag.training.stored import StoredTraining
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
DB: dict[str, Any] = {"name": "dag_db", "beta": {"value": 20.0}}
# PyTorch's error when memory is used up, and cuDNN's.
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
)
KL: dict[str, Any] = {"name": "dag_kl", "beta": {"value": 20.0}, "baseline": "running"}

PATHWISE: dict[str, Any] = {
    "name": "dag_kl",
    "beta": {"value": 20.0},
    "policy_gradient": "pathwise",
    "forward_looking": {"weight": "fitted"},
}
NABLA: dict[str, Any] = {"name": "nabla_db", "beta": {"value": 20.0}, "forward_looking": {"weight": "one"}}
JPEG = {"name": "compressibility"}
MIXED = [{"name": "colourfulness"}, {**JPEG, "weight": 0.5}]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def trainer_of(recipe: Recipe, run: RunFolder) -> Trainer:
    """A trainer in which nothing has its initial value: adapter, flow, its constants and slopes, residual scales, baseline."""
    trainer = building.trainer_of(recipe, run)
    disturb(trainer.components)
    flow_fit = trainer.components.learner.flow_fit
    if flow_fit is None:
        return trainer
    T = len(flow_fit.residual_scale)
    flow_fit.flow.constants += torch.linspace(-30, 40, T)
    if flow_fit.flow.slopes is not None:
        flow_fit.flow.slopes += torch.linspace(-300, 60, T)
    flow_fit.residual_scale = torch.linspace(20, 60, T)
    flow_fit.baseline = torch.linspace(5, -8, T)
    return trainer


def captured(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, update: Callable[[], object]) -> list[torch.Tensor]:
    """The gradients (of the policy, then of the flow) at the first optimizer step of `update`, which makes no step."""
    found: list[list[torch.Tensor]] = []

    def capture(stepper: Any) -> float:
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stepper.parameters])
        return 0.0

    monkeypatch.setattr("dag.training.optimizer.ClippedOptimizer.step", capture)
    update()
    monkeypatch.undo()
    return [gradient for group in found[:2] for gradient in group]


def in_two_passes(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients of one update on a stored rollout, without recentring the flow."""
    learner, trajectories = trainer.components.learner, sampled(trainer, 1)
    score = trainer.sampling.scorer(Batch(trajectories.prompt_id, trajectories.sample_id))
    rollout, rows = learner.rollout(trajectories, 1, score), torch.arange(trajectories.num_trajectories)

    training, state = StoredTraining(learner, trainer.meter), trainer.begin_epoch(1)

    def update() -> None:
        trainer._run(
            lambda: training._update(rollout, rows, state, lambda n: None),
            lambda why: learner.updates.halve_micro_batch(state, why),
        )

    return captured(trainer, monkeypatch, update)


def in_one_pass(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    return captured(trainer, monkeypatch, lambda: one_pass(trainer, 1))


# Two micro-batches an update, whose gradients add up in order; the others have one.
TWO: dict[str, Any] = {"trajectories": 8}
CHANGES: list[dict[str, Any]] = [
    {"train": TWO},
    {"objective": KL},
    {"objective": {**KL, "advantage_clip": 0.5, "weight": 3.0}},
    {"objective": {**DB, "detach_next": False}},
    {"objective": {**DB, "prior": "pretrained"}},
    {"objective": {**DB, "huber": 0.5, "step_weight": "balanced", "residual_scale": "running"}},
    {"objective": {**DB, "forward_looking": {"source": "none"}}},
    # The last three states are scored always: five steps have one that is not.
    {"objective": {**DB, "forward_looking": {"stride": 3, "weight": "one"}}, "sampler": {"steps": 5}},
    {"objective": {**DB, "forward_looking": {"decoder": "half"}}},
    {"objective": {**DB, "log_prob_reduction": "mean"}},
    {"flow": {"slopes": True}},
    {"sampler": {"guidance_scale": 1.0}},
    {"sampler": {"uncond": "frozen"}},
    {"sampler": {"chain_dtype": "fp16"}},
    {"regulariser": {"pretrained_kl": 0.1}},
    {"train": {"step_fraction": 0.5}},
    {"train": {**TWO, "micro_batch": 3}, "sampler": {"tile": 3}},
    {"prompts": {"texts": ["a cat", "a dog"], "per_group": 2, "shared_start": True}},
    {"memory": {"checkpointing": "full"}},
    {"objective": PATHWISE, "train": TWO},
    {"objective": {**PATHWISE, "prior": "pretrained", "learnt_flow": False}},
    {"objective": {**PATHWISE, "jacobian": "none", "log_prob_reduction": "mean"}},
    {"objective": {**PATHWISE, "prior": "pretrained", "learnt_flow": False, "jacobian": "pretrained"}},
    {"objective": {**PATHWISE, "name": "dag_db"}, "sampler": {"chain_dtype": "fp16"}},
    {"objective": {**PATHWISE, "policy_gradient": "control_variate", "correction": 0.5}, "reward": JPEG},
    {"objective": PATHWISE, "sampler": {"uncond": "frozen"}},
    {"objective": PATHWISE, "memory": {"checkpointing": "full"}, "sampler": {"uncond": "frozen"}},
    {"objective": {**PATHWISE, "prior": "pretrained"}, "reward": MIXED, "regulariser": {"pretrained_kl": 0.1}},
    {"objective": {**NABLA, "learnt_flow": False}, "train": TWO},
    {"objective": {**NABLA, "prior": "pretrained"}},
    {"objective": {**NABLA, "weight": "one", "reverse": 0.3}, "reward": JPEG, "train": {"step_fraction": 0.5}},
]


# Half precision takes the same way through the code; a few changes show it.
@pytest.mark.parametrize(
    ("change", "dtype"),
    [*((change, "fp32") for change in CHANGES), *((change, "bf16") for change in CHANGES[::4])],
    ids=str,
)
def test_the_gradient_is_that_of_two_passes(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], dtype: str
) -> None:
    """Equal to the last bit, since one pass does the same operations on the same numbers, only earlier."""
    sections = copy.deepcopy(change)
    sections["train"] = {"updates": 1, "rollout": "one_pass", "trajectories": 4, **sections.get("train", {})}
    sections["sampler"] = {"steps": 4, **sections.get("sampler", {})}
    if "reward" in sections:
        sections["flow"] = {"warmup_epochs": 1}  # a critic must have learnt before
    recipe = make_recipe(**sections, model={"dtype": dtype})
    trainer = trainer_of(recipe, run)
    two = in_two_passes(trainer, monkeypatch)
    trainer.learner.updates.optimizer_step = 0  # by which the steps of an update are drawn
    one = in_one_pass(trainer, monkeypatch)
    assert max(float(gradient.abs().max()) for gradient in two) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_leaves_the_numbers_of_a_stored_rollout(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer = trainer_of(make_recipe(train={"updates": 1, "rollout": "one_pass"}), run)
    stored = sampled(trainer, 1)
    found, metrics = one_pass(trainer, 1)
    for name in ("log_pf", "log_pb", "x0_hat_reward", "reward", "prompt_id", "sample_id"):
        assert torch.equal(getattr(found, name), getattr(stored, name)), name
    assert found.chain.shape[0] == 0, "no chain is kept"
    assert metrics["ratio_max_dev"] == 0.0
    assert metrics["residual_rms"] > 0


def test_flow_passes_keep_and_use_the_chain(make_recipe: MakeRecipe, run: RunFolder) -> None:
    train = {"updates": 1, "rollout": "one_pass"}
    flows, chains, fit_flow = [], [], FlowFit.fit
    for passes in (0, 1):
        trainer = trainer_of(make_recipe(train=train, flow={"passes": passes, "warmup_epochs": 1}), run)
        stored = sampled(trainer, 1)

        def seen(fit: FlowFit, trajectories: Trajectories, *rest: Any) -> None:
            chains.append(trajectories.chain)
            fit_flow(fit, trajectories, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FlowFit, "fit", seen)
            one_pass(trainer, 1)
        assert trainer.components.flow is not None
        flows.append([p.clone() for p in trainer.components.flow.parameters()])
    (chain,) = chains
    assert torch.equal(chain, stored.chain)
    assert any(not torch.equal(a, b) for a, b in zip(*flows, strict=True))


def test_every_update_samples_with_the_policy_of_the_moment(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """The trajectories of the second update are not those that the policy before the first update would sample."""
    trainer = trainer_of(make_recipe(train={"updates": 2, "rollout": "one_pass", "learning_rate": 0.05}), run)
    before = sampled(trainer, 1)
    found, metrics = one_pass(trainer, 1)
    assert torch.equal(found.log_pb[:4], before.log_pb[:4])
    assert (found.log_pb[4:] - before.log_pb[4:]).abs().min() > 0
    assert metrics["ratio_max_dev"] == 0.0
    assert trainer.components.learner.updates.optimizer_step == 2


def test_a_whole_run(make_recipe: MakeRecipe, run: RunFolder) -> None:
    """Warm-up epochs train on stored chains, later ones in one pass; the run exports its weights."""
    recipe = make_recipe(
        train={"rollout": "one_pass", "epochs": 3},
        flow={"warmup_epochs": 1},
        objective={"beta": {"value": 20.0, "unit": "reward_sd"}},
    )
    trainer, _ = rolled_out(recipe, run)
    assert [trainer.is_one_pass(epoch) for epoch in range(3)] == [False, True, True]
    trainer.fit()
    rows = run.metrics.read()
    assert [row["optimizer_step"] for row in rows] == [0, 0, 2, 4]
    assert "loss" not in rows[1] and rows[2]["loss"] > 0
    assert (run.weights / "pytorch_lora_weights.safetensors").exists()


def test_a_resumed_run_is_the_undisturbed_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"rollout": "one_pass", "epochs": 3}, objective=KL, flow={"warmup_epochs": 1})
    undisturbed, broken = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "broken"))
    rolled_out(recipe, undisturbed)[0].fit()
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 2})})
    rolled_out(short, broken)[0].fit()
    rolled_out(recipe, broken)[0].fit(is_resumed=True)
    ours, theirs = undisturbed.metrics.read(), broken.metrics.read()
    for name in ("reward_mean", "loss", "residual_rms", "grad_norm_policy", "grad_norm_flow"):
        assert ours[-1][name] == theirs[-1][name], name


@pytest.mark.parametrize("rollout", ["stored", "one_pass"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_update(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, rollout: str, capsys: Any
) -> None:
    recipe = make_recipe(train={"rollout": rollout, "updates": 1, "micro_batch": 8}, sampler={"tile": 2})
    found = []
    for limit in (8, 3):
        trainer = trainer_of(recipe, run)
        trainer.components.learner.updates.warn = print
        predict = trainer.components.policy.predict

        def limited(x_t: torch.Tensor, *rest: Any, limit: int = limit, predict: Any = predict, **options: Any) -> Any:
            if len(x_t) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return predict(x_t, *rest, **options)

        monkeypatch.setattr(trainer.components.policy, "predict", limited)
        update = in_one_pass if rollout == "one_pass" else in_two_passes
        with pytest.MonkeyPatch.context() as patch:
            found.append(update(trainer, patch))
        assert trainer.components.learner.updates.micro_batch == (8 if limit == 8 else 2)
    assert "micro-batch 4 from here on" in capsys.readouterr().out
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    # Smaller micro-batches add float32 numbers in another order.
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-4 * scale


def test_what_failed_is_freed_before_the_next_try(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that only a reference cycle holds, as dynamo's and autograd's frames do, are freed too."""
    trainer = trainer_of(make_recipe(train={"rollout": "one_pass", "micro_batch": 4}), run)
    predict, too_many, seen = trainer.components.policy.predict, [], []

    def limited(x_t: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(x_t) > 2:
            activations = torch.zeros(3)
            cycle: list[Any] = [activations]
            cycle.append(cycle)
            too_many.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(x_t, *rest, **options)

    monkeypatch.setattr(trainer.components.policy, "predict", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append([ref() for ref in too_many]))
    gc.disable()
    try:
        one_pass(trainer, 1)
    finally:
        gc.enable()
    assert seen == [[None]]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_out_of_memory_in_a_reward_halves_too(make_recipe: MakeRecipe, run: RunFolder, error: Exception) -> None:
    trainer = trainer_of(make_recipe(train={"rollout": "one_pass", "micro_batch": 4}, sampler={"tile": 4}), run)
    ((name, weight, reward),) = trainer.components.reward.parts

    def limited(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        if len(images) > 2:
            raise error
        return reward(images, prompts)

    trainer.components.reward.parts = [(name, weight, limited)]
    one_pass(trainer, 1)
    assert trainer.components.learner.updates.micro_batch == 2


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_out_of_memory_in_the_evaluation_halves_the_tile(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = trainer_of(make_recipe(sampler={"tile": 4}), run)
    before, decode = trainer.evaluate(), trainer.components.policy.decode

    def limited(x_0: torch.Tensor) -> torch.Tensor:
        if len(x_0) > 2:
            raise error
        return decode(x_0)

    monkeypatch.setattr(trainer.components.policy, "decode", limited)
    after = trainer.evaluate()
    assert trainer.tile == 2
    assert before is not None and after is not None
    torch.testing.assert_close(after.images, before.images, rtol=0, atol=1e-4)


def test_out_of_memory_at_one_row_ends_in_a_sentence(
    make_recipe: MakeRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_recipe(train={"rollout": "one_pass"}), run)

    def never(*anything: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.components.policy, "predict", never)
    with pytest.raises(RunError, match=r"out of GPU memory at micro-batch 1; memory.* \(CUDA out of memory\)$"):
        one_pass(trainer, 1)
    with pytest.raises(RunError, match=r"while sampling one picture.* \(CUDA out of memory\)$"):
        sampled(trainer, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"name": "ddpo"}}, "ddpo trains on complete trajectories"),
        ({"objective": {**KL, "baseline": "per_step"}}, "objective.baseline=per_step"),
        ({"objective": {**DB, "forward_looking": {"source": "current"}}}, "forward_looking.source=rollout"),
        ({"train": {"inner_epochs": 2}}, "train.inner_epochs=2"),
        ({"regulariser": {"sampling": 1.0}}, "regulariser.sampling is zero"),
        ({"sampler": {"log_pf_at": "unrounded"}}, "sampler.log_pf_at=unrounded"),
        ({"objective": {**DB, "beta": {"value": 1.0, "unit": "reward_sd"}}}, "set flow.warmup_epochs"),
        ({"memory": {"offload_vae": True}}, "memory.offload_vae"),
        ({"reward": {"name": "image_text", "offload": True}}, "reward.offload"),
        ({"memory": {"chains": "cpu"}}, "memory.chains=cpu"),
    ],
    ids=str,
)
def test_what_one_pass_could_only_ignore_is_refused(
    make_recipe: MakeRecipe, change: dict[str, Any], message: str
) -> None:
    sections = {**change, "train": {"rollout": "one_pass", **change.get("train", {})}}
    with pytest.raises(UsageError, match=message):
        make_recipe(**sections)


def test_the_meter_hears_of_both_phases(make_recipe: MakeRecipe, run: RunFolder) -> None:
    trainer = trainer_of(make_recipe(train={"rollout": "one_pass"}), run)
    one_pass(trainer, 1)
    seconds = trainer.meter.seconds
    assert min(seconds["update"], seconds["reward"]) > 0
    assert seconds["sample"] == seconds["evaluation"] == 0
