"""A run that is stopped anywhere and resumed equals an undisturbed run, bit for bit."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.building import NEVER, Soon, micro_batches, parts_of, poisoned, rows, tiles, trained, trained_in_pieces
from safetensors.torch import load_file

from dag.errors import RunError, StoppedError
from dag.recipe import Recipe
from dag.run import checkpoint
from dag.run.folder import RunFolder
from dag.run.tree import packed, unpacked
from dag.training.epoch_state import EpochState
from dag.training.trainer import Trainer

MakeRecipe = Callable[..., Recipe]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(next(run.weights.rglob("*model.safetensors"), run.weights / "pytorch_lora_weights.safetensors"))


KINDS: dict[str, dict[str, Any]] = {
    "dag_db": {
        "objective": {"residual_scale": "running", "beta": {"value": 20.0, "unit": "reward_sd"}},
        "flow": {"passes": 1, "warmup_epochs": 1},
        "train": {"step_fraction": 0.75, "inner_epochs": 2},
    },
    "dag_kl_8bit": {
        "objective": {"name": "dag_kl"},
        "train": {"optimizer": "adamw8bit"},
        "adapter": {"rank": 600},  # several layers of more than 4096 weights: their 8-bit states share a table
        "memory": {"chains": "cpu"},
    },
    "critic": {
        "objective": {
            "name": "dag_kl",
            "policy_gradient": "control_variate",
            "forward_looking": {"weight": "fitted"},
            "beta": {"value": 20.0, "unit": "reward_sd"},
        },
        "reward": [{"name": "colourfulness"}, {"name": "compressibility"}],
        "reward_critic": {"width": 8, "passes": 2, "rollouts": 2},
        "flow": {"warmup_epochs": 1},
        "train": {
            "step_fraction": 0.5,
            "step_choice": "informative",
            "keep_terminal": False,
            "max_kl": 0.01,
            "learning_rate_schedule": "linear",
        },
    },
    "critic_in_one_pass": {
        "objective": {"name": "nabla_db", "prior": "pretrained", "forward_looking": {"weight": "fitted"}},
        "reward": {"name": "compressibility"},
        "reward_critic": {"width": 8, "passes": 2, "rollouts": 2},
        "flow": {"warmup_epochs": 1},
        "train": {"rollout": "one_pass", "max_kl": 0.01},
    },
    "ddpo": {"objective": {"name": "ddpo", "per_prompt": 2}, "adapter": {"text_encoder": {"rank": 2}}},
    "value": {
        "objective": {"name": "ddpo", "baseline": "value"},
        "reward_critic": {"width": 8, "passes": 2},
        "flow": {"warmup_epochs": 1},
        "train": {"epochs": 3},
    },
    "tb": {
        "objective": {"name": "tb", "prior": "pretrained"},
        "prompts": {"texts": ["a cat", "a dog"], "per_group": 2},
        "train": {"inner_epochs": 2, "step_window": [0, 3]},
    },
    "tb_flow": {
        "objective": {"name": "tb", "prior": "pretrained", "log_z": "flow"},
        "flow": {"passes": 1, "slopes": True, "warmup_epochs": 1},
        "train": {"epochs": 3, "step_fraction": 0.5},
        "data": {"replay": 1},
    },
    "subtb": {"objective": {"name": "subtb"}, "flow": {"passes": 1}, "train": {"step_fraction": 0.5}},
    "backprop": {"objective": {"name": "backprop", "last": [1, 3]}, "regulariser": {"pretrained_kl": 0.1}},
    "copies": {"objective": {"name": "backprop", "copies": 3}, "train": {"inner_epochs": 2, "epochs": 2}},
    "full": {"adapter": {"kind": "full"}, "train": {"learning_rate": 1e-5}},
    "one_pass": {"train": {"rollout": "one_pass"}, "flow": {"slopes": True, "passes": 1, "warmup_epochs": 1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_pieces_is_the_undisturbed_one(make_recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    sections = dict(KINDS[kind])
    if sections.get("train", {}).get("optimizer"):
        pytest.importorskip("bitsandbytes")
    sections["train"] = {"epochs": 2, "trajectories": 4, "micro_batch": 1, **sections.get("train", {})}
    recipe = make_recipe(
        **sections,
        sampler={"tile": 2},
        evaluation={"every": 2, "images_per_prompt": 2, "prompts": 1},
        checkpoint={"every": 100, "keep": 3},
    )
    undisturbed, parted = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "parted"))
    trained(recipe, undisturbed)
    # Four or five stops, not at a divisor of an epoch's safe points: they fall on tiles, micro-batches, ends of updates and
    # evaluations.
    few = {"dag_db": 7, "critic": 3, "backprop": 3, "copies": 3, "subtb": 5, "tb": 12}
    points = few.get(kind, 2 if "one_pass" in kind else 9)
    names = trained_in_pieces(recipe, parted, points)
    assert len(names) > 3
    assert rows(undisturbed.path) == rows(parted.path)
    ours, theirs = weights(undisturbed), weights(parted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept = checkpoint.candidates(parted.checkpoints)
    assert len(kept) == 3
    states = checkpoint.load_tensors(kept[0], "optimizer_policy").values()
    assert any(state.dtype == torch.uint8 for state in states) == (kind == "dag_kl_8bit")
    assert not list(parted.path.rglob(".tmp-*"))
    assert (parted.samples / "before_after.png").read_bytes() == (undisturbed.samples / "before_after.png").read_bytes()


@pytest.mark.parametrize("kind", ["dag_db", "one_pass"])
def test_what_is_in_flight_comes_back_on_the_policys_device(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: what a resume leaves on the CPU is moved there only when it is used."""
    recipe, run = make_recipe(**KINDS[kind]), RunFolder.create(tmp_path / "run")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 3})})
    trainer = Trainer(recipe, run, parts_of(recipe))
    seen: list[EpochState] = []
    original = trainer.safe_points.reach

    def reach() -> None:
        original()
        state = trainer.state
        if state is not None and state.sums.updates == 1 and state.micro_batches == 1:
            tensors: dict[str, torch.Tensor] = {}
            stored = unpacked(packed(state.state(), tensors), tensors)
            restored = EpochState(state.epoch, state.store.emptied())
            restored.load_state(stored, torch.device("meta"))
            seen.append(restored)

    monkeypatch.setattr(trainer.safe_points, "reach", reach)
    trainer.fit()
    assert seen
    for restored in seen:
        found: dict[str, torch.Tensor] = {}
        packed(restored.state(), found)
        behind = {name for name, tensor in found.items() if tensor.device.type != "meta"}
        assert {name.rsplit("/", 1)[-1] for name in behind} <= {"prompt_id", "chain", "per_trajectory"}


def test_trajectories_of_an_earlier_version_are_read_under_todays_names(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """A checkpoint inside an epoch calls the rewards of x0_hat `looking` there."""
    trainer = Trainer(make_recipe(), RunFolder.create(tmp_path / "run"), parts_of(make_recipe()))
    state = trainer.begin_epoch(0)
    trainer.sample(state)
    stored = state.state()
    reward = stored["sampled"]["x0_hat_reward"]
    assert reward is not None
    stored["sampled"] = {"looking" if name == "x0_hat_reward" else name: v for name, v in stored["sampled"].items()}
    restored = EpochState(0, state.store.emptied())
    restored.load_state(stored, torch.device("cpu"))
    found = restored.rollout().x0_hat_reward
    assert found is not None and torch.equal(found, reward)


def test_a_loss_scale_is_there_for_a_step_that_follows_a_resume(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Losses are scaled with fp16 only, which needs a GPU; here its scaler runs on the CPU."""

    def scaled(trainer: Trainer) -> Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.components.learner.updates.policy.scaler = scaler
        return trainer

    recipe = make_recipe(train={"epochs": 1}, checkpoint={"every": 9})
    undisturbed, parted = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "parted"))
    scaled(Trainer(recipe, undisturbed, parts_of(recipe))).fit()
    # A stop at every safe point of the epoch: each tile, each micro-batch, the end of the updates. Before the first stop the
    # tile of the first evaluation passes; the last start runs to the end.
    stops = tiles(recipe) + micro_batches(recipe) + 1
    points = [1, *[0] * (stops - 1), NEVER]
    for number, until in enumerate(points):
        trainer = scaled(Trainer(recipe, parted, parts_of(recipe), interrupt=Soon(until)))
        with suppress(StoppedError):
            trainer.fit(is_resumed=number > 0)
            assert number == len(points) - 1
    assert rows(undisturbed.path) == rows(parted.path)


def test_a_skipped_update_can_be_saved(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The skipped update's loss is not finite, and is part of the state that a stop saves."""
    recipe = make_recipe(train={"epochs": 1, "updates": 2}, checkpoint={"every": 9})
    undisturbed, parted = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "parted"))

    def trainer_of(run: RunFolder, points: int) -> Trainer:
        trainer = Trainer(recipe, run, parts_of(recipe), interrupt=Soon(points))
        poisoned(trainer, sample=1, k=1, times=1)
        return trainer

    trainer_of(undisturbed, NEVER).fit()
    names: list[str] = []
    passed = 2
    while True:
        try:
            trainer_of(parted, passed).fit(is_resumed=bool(names))
            break
        except StoppedError as stopped:
            names.append(str(stopped.saved))
    evaluations = 2  # before the epoch and after it, one tile each
    safe_points = tiles(recipe) + micro_batches(recipe) + 1 + evaluations
    assert len(names) == safe_points // (passed + 1)
    assert rows(undisturbed.path) == rows(parted.path)
    assert rows(undisturbed.path)[-1]["loss"] is None


def test_time_alone_takes_checkpoints_inside_an_epoch(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances a minute whenever it is read, a checkpoint is due at every third safe point."""
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 60.0
        return now

    monkeypatch.setattr("dag.training.safe_points.time.monotonic", monotonic)
    recipe = make_recipe(train={"epochs": 1}, checkpoint={"minutes": 2.5, "keep": 100})
    run = trained(recipe, RunFolder.create(tmp_path / "run"))
    inside = [path.name for path in checkpoint.candidates(run.checkpoints) if path.name.startswith("epoch_0000_")]
    ends = 1 + 1  # the end of the updates, the tile of the evaluation after them
    assert len(inside) == (tiles(recipe) + micro_batches(recipe) + ends) // 3
    none = make_recipe(train={"epochs": 1}, checkpoint={"minutes": None})
    run = trained(none, RunFolder.create(tmp_path / "none"))
    assert [path.name for path in checkpoint.candidates(run.checkpoints)] == ["epoch_0001"]


@pytest.mark.parametrize("rollout", ["stored", "one_pass"])
def test_a_reward_that_fails_leaves_what_was_done(make_recipe: MakeRecipe, tmp_path: Path, rollout: str) -> None:
    """The reward fails once, in the second epoch; the resumed run equals an undisturbed one."""
    recipe = make_recipe(
        train={"rollout": rollout, "micro_batch": 2},
        sampler={"tile": 2},
        flow={"warmup_epochs": 0 if rollout == "stored" else 1},
        checkpoint={"every": 100},
    )
    undisturbed, broken = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "broken"))
    trained(recipe, undisturbed)
    trainer = Trainer(recipe, broken, parts_of(recipe))
    original, calls = trainer.components.reward.total, 0
    calls_per_tile = recipe.sampler.steps + 1  # x0_hat at every state, and the final picture
    failing_call = (tiles(recipe) + 1) * calls_per_tile + 3  # in the second epoch, the third call of the second tile

    def total(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise RunError("no answer")
        return original(*arguments, **options)

    trainer.components.reward.total = total  # type: ignore[method-assign]
    with pytest.raises(RunError, match="no answer"):
        trainer.fit()
    (saved,) = checkpoint.candidates(broken.checkpoints)
    assert saved.name.startswith("epoch_0001_")
    Trainer(recipe, broken, parts_of(recipe)).fit(is_resumed=True)
    assert rows(undisturbed.path) == rows(broken.path)


def test_a_run_without_checkpoint_starts_anew(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(train={"epochs": 1})
    undisturbed, again = (RunFolder.create(tmp_path / name) for name in ("undisturbed", "again"))
    trained(recipe, undisturbed)
    again.metrics.write({"epoch": 0, "left": "over"})
    Trainer(recipe, again, parts_of(recipe)).fit(is_resumed=True)
    assert "has no checkpoint yet: training starts anew" in capsys.readouterr().out
    assert rows(undisturbed.path) == rows(again.path)


def test_resume_says_what_it_takes_and_what_it_skips(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = make_recipe(train={"epochs": 3}, checkpoint={"keep": 3}), RunFolder.create(tmp_path / "run")
    trained(recipe, run)
    before = rows(run.path)
    (run.checkpoints / "epoch_0003" / "manifest.json").unlink()
    with (run.checkpoints / "epoch_0002" / "policy.safetensors").open("r+b") as file:
        file.truncate(100)
    Trainer(recipe, run, parts_of(recipe)).fit(is_resumed=True)
    said = capsys.readouterr().out
    assert "resumed after epoch 1 from" in said
    assert "skipped epoch_0003: manifest.json is missing; epoch_0002: policy.safetensors has 100 bytes of" in said
    assert rows(run.path) == before
    assert all(checkpoint.flaw(path) is None for path in checkpoint.candidates(run.checkpoints))


def test_what_a_kill_has_half_removed_is_gone_after_a_resume(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Killed while the last checkpoint removes an older one, a run writes no further one that would do it."""
    recipe, run = make_recipe(train={"epochs": 1}), RunFolder.create(tmp_path / "run")
    trained(recipe, run)
    (run.checkpoints / ".tmp-epoch_0000_000003-old").mkdir()
    Trainer(recipe, run, parts_of(recipe)).fit(is_resumed=True)
    assert [path.name for path in run.checkpoints.iterdir()] == ["epoch_0001"]


def test_resume_on_another_model_or_other_prompts_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    recipe = make_recipe(train={"epochs": 1}).model_copy(
        update={"prompts": make_recipe().prompts.model_copy(update={"texts": None, "file": str(prompts)})}
    )
    run = trained(recipe, RunFolder.create(tmp_path / "run"))
    before = run.metrics.text()
    prompts.write_text("a cat\na cow\n")
    with pytest.raises(RunError, match="epoch_0001: was trained on another prompts than this recipe names now"):
        Trainer(recipe, run, parts_of(recipe)).fit(is_resumed=True)
    prompts.write_text("a cat\na dog\n")
    parts = parts_of(recipe)
    parts.fingerprint["unet"] = "of another"
    with pytest.raises(RunError, match="was trained on another unet"):
        Trainer(recipe, run, parts).fit(is_resumed=True)
    assert run.metrics.text() == before
