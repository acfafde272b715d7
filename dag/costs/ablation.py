"""The recipes that `dag.bench` compares: from the published amount of work on, one more lever on memory and time in each."""

import argparse
from collections.abc import Iterator, Sequence

from dag.errors import UsageError
from dag.models.source import counted_as, local_folder
from dag.recipe import Recipe
from dag.recipe.load import load

# In every row each transition is trained once, with one update per rollout, so that rows differ in their levers alone.
COMMON = (
    "train.updates=1",
    "train.inner_epochs=1",
    "train.step_fraction=1",
    "train.step_window=null",
    "train.step_choice=uniform",
    "flow.warmup_epochs=0",
    "flow.passes=0",
    "regulariser.sampling=0",
    "regulariser.pretrained_kl=0",
)
STORED = (
    "train.rollout=stored",
    "objective.forward_looking.source=rollout",
    "objective.forward_looking.decoder=full",
    "objective.forward_looking.decoder_path=null",
    "objective.forward_looking.stride=1",
    "sampler.uncond=trained",
)
ONE_PASS = (
    "train.rollout=one_pass",
    "sampler.log_pf_at=stored",
    "memory.chains=device",
    "memory.offload_vae=false",
)
# (label, overrides) of each row; a row keeps the levers of the rows before it.
ABLATION: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stored, scored once", STORED),
    ("one pass", ONE_PASS),
    ("+ tiny decoder for x0_hat", ("objective.forward_looking.decoder=tiny",)),
    ("+ every second x0_hat scored", ("objective.forward_looking.stride=2",)),
    ("+ frozen unconditional branch", ("sampler.uncond=frozen",)),
)
# DAG-KL by the reward's gradient towards p_pretrained exp(beta r), without a learnt flow.
_PATHWISE = (
    "objective={name: dag_kl, beta: {value: 10}, prior: pretrained, policy_gradient: pathwise, learnt_flow: false}",
    "flow.passes=0",
)
# (label, overrides) of each row by the reward's gradient; a row has no levers but its own.
BY_GRADIENT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stored, exact reward gradient", (*STORED, *_PATHWISE)),
    ("stored, learnt reward gradient", (*STORED, *_PATHWISE, "objective.reward_gradient=learnt")),
)


# The published work is that of detailed balance with a learnt flow, whatever the recipe's objective is.
_PUBLISHED = ("objective={name: dag_db, beta: {value: 1}}", *STORED, "memory.checkpointing=none", "kernels=torch")


def cases(path: str, given: Sequence[str], trajectories: int | None, is_ablation: bool) -> Iterator[tuple[str, Recipe]]:
    """Yield (label, recipe) of each row after the published one.

    A lever that contradicts the recipe is left out, and the reason is printed.

    Args:
        path:         the recipe's file.
        given:        the user's overrides.
        trajectories: per epoch; None takes one micro-batch.
        is_ablation:  one row for each lever and kind of reward gradient; else one row, the recipe as it is.

    Raises:
        UsageError: the recipe's objective has no flow.
    """
    overrides = comparable(path, given, trajectories)
    recipe = load(path, overrides)
    assert recipe.balance is not None
    section = recipe.balance.forward_looking
    if not is_ablation:
        scored = {"rollout": "scored once", "current": "scored in training", "none": "not scored"}[section.source]
        yield ("one pass" if recipe.train.rollout == "one_pass" else f"stored, {scored}"), recipe
        return
    common = tuple(overrides)
    for label, lever in ABLATION:
        changes = [*lever]
        if section.decoder_path is not None and "objective.forward_looking.decoder=tiny" in lever:
            changes.append(f"objective.forward_looking.decoder_path={section.decoder_path}")
        if (row := _possible(label, path, [*overrides, *changes])) is not None:
            overrides += changes
            yield label, row
    for label, lever in BY_GRADIENT:
        if (row := _possible(label, path, [*common, *lever])) is not None:
            yield label, row


def _possible(label: str, path: str, overrides: Sequence[str]) -> Recipe | None:
    """The recipe of a row; None, and a line that says why, where the row's lever contradicts the recipe."""
    try:
        return load(path, overrides)
    except UsageError as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{path}: ")
        print(f"{label:30} left out: {reason}", flush=True)
        return None


def comparable(path: str, given: Sequence[str], trajectories: int | None) -> list[str]:
    """The overrides that all rows share, so that they do comparable work and need no download.

    Raises:
        UsageError: the recipe's objective has no flow.
    """
    overrides, recipe = list(given), load(path, given)
    if recipe.balance is None:
        raise UsageError(f"{path}: the bench times objectives with a flow, not {recipe.objective.name}")
    overrides += COMMON
    if not recipe.balance.takes_gradient:
        # By the reward's gradient the prior is part of the method: it stays, as in the rows BY_GRADIENT.
        overrides.append("objective.prior=none")
        if recipe.objective.name == "dag_kl":
            overrides += ["objective.baseline=running", "objective.normalise_advantage=false"]
    if recipe.balance.beta.unit == "reward_sd":
        overrides.append("objective.beta.unit=reward")
    if local_folder(recipe.model.path) is None:
        overrides += [f"model.path={counted_as(recipe.model.path)}", "model.variant=null"]
    return [*overrides, f"train.trajectories={trajectories or max(2, recipe.train.micro_batch)}"]


def variants(given: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """Yield (label, recipe) of each `--variant`."""
    common = comparable(given.recipe, given.set, given.trajectories)
    for variant in given.variant:
        yield variant, load(given.recipe, [*common, *variant.split()])


def published(path: str, given: Sequence[str], trajectories: int | None) -> Recipe:
    """The recipe whose model, reward and sizes `dag.costs.published_work` takes; no lever is on."""
    return load(path, [*comparable(path, given, trajectories), *_PUBLISHED])
