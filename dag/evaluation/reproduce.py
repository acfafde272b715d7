"""Run the missing runs of a study, judge all of them, and write its figures and tables.

Each study's folder gets figures (PNG, SVG), curves.csv, table.csv, table.md, and study.html, which holds everything in one
file.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dag.errors import DIVERGED, RunError, UsageError
from dag.evaluation import compare, figures, verdict
from dag.evaluation.curves import ends, evaluated
from dag.evaluation.figures import Line
from dag.evaluation.measure import BASE
from dag.evaluation.study import Case, Study, best_settings, cases_of, run_missing, tuning_cases
from dag.recipe import Recipe
from dag.run.gpu import free_memory, out_of_memory_ends, this_device


def reproduce(study: Study, folder: Path, seeds: int, jobs: int, gpus: Sequence[str] = ()) -> list[Case]:
    """Do what is missing of a study: tuning, runs, evaluation, figures.

    Args:
        seeds: runs of each method.
        jobs:  runs at a time.
        gpus:  GPUs as CUDA_VISIBLE_DEVICES names them; see `run_missing`.

    Returns:
        the runs that failed; the figures are drawn without them.

    Raises:
        RunError: every run failed, or a setting could not be tried.
    """
    tuned = tuning_cases(study, folder)
    # A setting that diverged has been tried and is not chosen. One that ended in another way has not been tried.
    broken = run_missing(tuned, jobs, gpus)
    if unknown := [case for case, code in broken.items() if code != DIVERGED]:
        raise RunError(f"{len(unknown)} settings could not be tried; see {unknown[0].log}")
    cases = cases_of(study, folder, seeds, best_settings(tuned))
    failed = run_missing(cases, jobs, gpus)
    done = [case for case in cases if case not in failed]
    if not done:
        raise RunError(f"every run failed; see {cases[0].log}")
    by_method = {method.name: [case for case in done if case.method == method] for method in study.methods}
    lines = [Line(name, tuple(case.metrics() for case in mine)) for name, mine in by_method.items() if mine]
    write(study, folder, lines, tuned, done, _judged(study, done, folder))
    return list(failed)


def _judged(study: Study, cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """The rows that `dag.evaluate` makes for the base model and every run; read from the disk if they are there."""
    file = folder / "evaluation" / "evaluation.json"
    if (known := _known(study, cases, file)) is not None:
        return known
    device = this_device()
    print(f"{len(cases)} runs are judged", flush=True)
    with out_of_memory_ends("out of GPU memory while judging; the same command goes on"):
        data, drawn = compare.evaluate(
            [case.folder for case in cases],
            device,
            num_prompts=study.prompts,
            images_per_prompt=study.images_per_prompt,
            features=cases[0].recipe().evaluation.diversity,
            distances=study.distances,
        )
    shown = {BASE, *(case.folder.name for case in cases if case.seed == 0)}
    if device.type == "cuda":
        # The runs of the next study are other processes, which need this memory of the GPU.
        free_memory()
    verdict.write(file.parent, data, {name: images for name, images in drawn.items() if name in shown})
    return data["models"]


def _known(study: Study, cases: Sequence[Case], file: Path) -> list[dict[str, Any]] | None:
    """The rows in `file`, if they were made from these runs' weights with the study's options; else None.

    None also if the file is missing, cannot be read, or was written by another version.
    """
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        found = (known["num_prompts"], known["images_per_prompt"], known["distances"], known["weights"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    weights = compare.weights_of([case.folder for case in cases])
    asked = (study.prompts, study.images_per_prompt, sorted(study.distances), weights)
    return known["models"] if found == asked else None


def write(
    study: Study,
    folder: Path,
    lines: Sequence[Line],
    tuned: Sequence[Case],
    cases: Sequence[Case],
    judged: Sequence[dict[str, Any]],
) -> None:
    """Write the study's figures, tables and page, and print the table of methods.

    Args:
        lines:  the runs' metrics, by method.
        tuned:  the runs of the tuning stage.
        cases:  the complete runs.
        judged: rows of `dag.evaluate` for the base model and these runs.
    """
    table, by_name = figures.summary(lines), {one["model"]: one for one in judged}
    for row in table:
        mine = [case for case in cases if case.method.name == row["method"]]
        row |= _strengths(mine[0].recipe())
        pictures_of = [by_name[case.folder.name] for case in mine]
        for key in ("vendi", *study.distances, "frechet", "kernel", "path_kl", "alignment"):
            row[key] = figures.mean([one[key] for one in pictures_of])
        row["commit"] = ", ".join(sorted({str(case.commit())[:7] for case in mine}))
    tables: dict[str, Sequence[dict[str, Any]]] = {"Methods": table}
    if tuned:
        tables["Settings tried"] = [_tried(case) for case in tuned]
    tables["Pictures judged"] = [
        {
            "model": row["model"],
            **{f"{name} ({kind})": value[kind] for name, value in row["rewards"].items() for kind in ("mean", "gain")},
            **{key: value for key, value in row.items() if key not in ("model", "rewards")},
        }
        for row in judged
    ]
    figures.write_csv(table, folder / "table.csv")
    figures.write_csv(list(figures.curve_rows(lines)), folder / "curves.csv")
    (folder / "table.md").write_text(figures.markdown(table) + "\n", encoding="utf-8")
    drawn = figures.draw(lines, folder, _fronts(tuned))
    pictures = folder / "evaluation" / "pictures.png"
    figures.page(study.title, study.question, tables, [*drawn, pictures], folder / "study.html")
    print(figures.markdown(table))
    print(f"{folder / 'study.html'}")


def _fronts(tuned: Sequence[Case]) -> list[Line]:
    """The complete runs of the tuning stage, by method."""
    by_method: dict[str, list[Case]] = {}
    for case in tuned:
        if case.is_complete():
            by_method.setdefault(case.method.name, []).append(case)
    return [Line(name, tuple(case.metrics() for case in mine)) for name, mine in by_method.items()]


def _strengths(recipe: Recipe) -> dict[str, float | None]:
    """The settings that decide how far a policy moves from the pretrained one."""
    return {
        "learning_rate": recipe.train.learning_rate,
        "pretrained_kl": recipe.regulariser.pretrained_kl,
        "beta": None if recipe.target is None else recipe.target.beta.value,
    }


def _tried(case: Case) -> dict[str, Any]:
    """One row of the table of tried settings; one that broke has no results."""
    setting = {"method": case.method.name, **_strengths(case.recipe())}
    ended = ("reward_last_quarter", "eval_reward", "diversity", "noun_top1")
    if not case.is_complete():
        return {**setting, **dict.fromkeys(ended)}
    rows = case.metrics()
    final = evaluated(rows)[-1]
    return setting | {
        "reward_last_quarter": ends(rows)[1],
        "eval_reward": final["eval_reward_mean"],
        "diversity": final.get("diversity"),
        "noun_top1": final.get("noun_top1"),
    }


def _refuse_fixed(study: Study) -> None:
    """Raise UsageError if `--set` gives a key that the study sets itself, for all runs or for some."""
    tuned = [key for method in study.methods for setting in method.tried for key in setting.overrides]
    chosen = [*study.overrides, *(override for method in study.methods for override in method.overrides)]
    for key in map(_key, study.given):
        for own in ("seed", *tuned, *map(_key, chosen)):
            if f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}."):
                raise UsageError(f"--set {key}: the study sets {own} itself")


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def check(
    study: Study,
    folder: Path,
    seeds: int,
    jobs: int,
    gpus: Sequence[str],
    check_budget: Callable[[Recipe], object],
) -> None:
    """Find before anything is run what would otherwise end the study after hours.

    Args:
        check_budget: raises UsageError for a recipe that is predicted to need more memory than `memory.budget_gib`.

    Raises:
        UsageError: an option, a recipe or the folder cannot be used.
    """
    _refuse_fixed(study)
    cases = [*tuning_cases(study, folder), *cases_of(study, folder, seeds, {})]
    recipes = [case.recipe() for case in cases]
    if gpus and jobs > len(gpus) and any(recipe.memory.budget_gib is not None for recipe in recipes):
        raise UsageError(f"--jobs {jobs}: these runs need a GPU each, and there are {len(gpus)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be made: {error.strerror}") from None
    for recipe in {case.method.name: recipe for case, recipe in zip(cases, recipes, strict=True)}.values():
        check_budget(recipe)
    if not (folder / "evaluation").exists():
        features = recipes[0].evaluation.diversity
        compare.instruments(recipes[0], features, study.distances, torch.device("cpu"), "evaluation.diversity")
