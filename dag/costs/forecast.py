"""Whether a recipe fits into memory, and which levers would make it fit: for `--plan` and `memory.budget_gib`."""

from collections.abc import Iterable, Iterator

from dag.chain.schedule import Schedule
from dag.costs.memory import Forecast, Simulation
from dag.errors import UsageError
from dag.models import families
from dag.recipe import Recipe
from dag.recipe.contradictions import validate
from dag.run.gpu import GIB

# A lever is named if it lowers the peak to less than this share.
_WORTH_NAMING = 0.98
# Beyond so many standard deviations a step's gradient is worth a warning. Stable Diffusion reaches 3.3 in 50 steps, 8.3 in 10.
_HARD = 10.0


def forecast(recipe: Recipe) -> Forecast:
    """The memory that a recipe is predicted to need on the policy's device."""
    return Simulation(recipe).forecast()


Lever = tuple[str, str, object]
# Levers to try where a recipe does not fit, as (section, key, value), the cheapest first.
LEVERS: tuple[Lever, ...] = (
    ("memory", "checkpointing", "selective"),
    ("memory", "checkpointing", "full"),
    ("train", "optimizer", "adamw8bit"),
    ("memory", "chains", "cpu"),
    ("memory", "offload_vae", True),
    ("memory", "decode_batch", 1),
    ("train", "micro_batch", 1),
    ("sampler", "tile", 1),
    ("memory", "base", "nf4"),
)


def lowered(
    recipe: Recipe, now: Forecast, levers: Iterable[Lever] | None = None
) -> Iterator[tuple[Lever, Recipe, Forecast]]:
    """Yield (lever, the recipe with it, its forecast) for each lever that alone would lower the peak by at least 2 %.

    Args:
        now:    the recipe's own forecast.
        levers: those that are tried; None takes all of LEVERS.
    """
    highest, enough = max(now.phases, key=lambda phase: now.phases[phase]), _WORTH_NAMING * now.peak
    for section, key, value in LEVERS if levers is None else levers:
        if getattr(getattr(recipe, section), key) == value:
            continue
        changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})
        if validate(changed):
            continue
        simulation = Simulation(changed)
        # If the highest phase stays high, the other phases need not be counted.
        if simulation.peak(highest) < enough and (found := simulation.forecast()).peak < enough:
            yield (section, key, value), changed, found


def savings(recipe: Recipe, now: Forecast) -> Iterator[tuple[str, int]]:
    """Yield (key=value, peak bytes with it) for each of `LEVERS` that `lowered` finds; `now` is the recipe's own forecast."""
    for lever, _, found in lowered(recipe, now):
        yield named(lever), found.peak


def named(lever: Lever) -> str:
    """A lever as `section.key=value`."""
    section, key, value = lever
    return f"{section}.{key}={str(value).lower()}"


def describe(recipe: Recipe) -> Iterator[str]:
    """Yield the lines about memory that `--plan` prints; each lever takes seconds."""
    yield _pull(families.schedule_of(recipe))
    found = forecast(recipe)
    parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in found.standing.items() if size >= 0.005 * GIB)
    yield f"memory        {found.peak / GIB:.2f} GiB at the peak, without the GPU's own context of some hundred MiB" + (
        "" if found.counted_as == recipe.model.path else f" (taken for {found.counted_as})"
    )
    yield f"standing      {parts or 'under 0.01'} GiB"
    yield "phases        " + ", ".join(f"{phase} {size / GIB:.2f}" for phase, size in found.phases.items()) + " GiB"
    for lever, peak in savings(recipe, found):
        yield f"would save    {lever}: {peak / GIB:.2f} GiB at the peak"


def _pull(schedule: Schedule) -> str:
    """The line about the step in which an output of the network moves the state most, in standard deviations of its noise."""
    pull = (schedule.mean_output.abs() / schedule.sigma).tolist()
    k = max(range(len(pull)), key=pull.__getitem__)
    line = f"chain         {len(pull)} transitions, |b| / sigma at most {pull[k]:.2f}, in transition {k}"
    if pull[k] > _HARD:
        line += "; its gradient outweighs all others: objective.step_weight=balanced, or train.step_window without it"
    return line


def check_budget(recipe: Recipe) -> None:
    """Raises UsageError if the recipe is predicted to need more than its `memory.budget_gib`."""
    budget = recipe.memory.budget_gib
    if budget is None:
        return
    found = forecast(recipe)
    if found.peak > budget * GIB:
        phase = max(found.phases, key=lambda name: found.phases[name])
        levers = [f"{lever} ({peak / GIB:.2f})" for lever, peak in savings(recipe, found)]
        raise UsageError(
            f"memory.budget_gib={budget:g}: the {phase} is predicted to need {found.peak / GIB:.2f} GiB; "
            + (f"levers, each alone: {', '.join(levers)}" if levers else "no lever would lower that")
        )
