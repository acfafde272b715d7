"""Run a study and draw it: `python -m dag.reproduce NAME [--scale tiny|paper] [--seeds N] [--jobs K] [--out DIR]`.

    figure3      DAG-DB, DAG-KL and DDPO on learned rewards
    figure4      the same on JPEG compressibility and incompressibility
    comparison   the three with the same trajectories and the same budget of tuning, without a regulariser and with it
    ablations    one choice of DAG-DB at a time

`tiny` is the embedded model on a CPU, `paper` Stable Diffusion 1.5 with the published settings on one GPU. Runs that are
complete are not run again, interrupted ones are resumed. Each study's folder gets figures (PNG, SVG), curves.csv,
table.csv, and study.html, which holds everything in one file.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dag import evaluate, figures, verdict
from dag.curves import ends, evaluated
from dag.errors import DIVERGED, RunError, UsageError, exit_code
from dag.figures import Line
from dag.forecast import check_budget
from dag.gpu import free_memory, out_of_memory_ends, this_device
from dag.measure import BASE
from dag.perceptual import DISTANCES
from dag.recipe import PolicyGradient, Recipe
from dag.study import Case, Study, best_settings, cases_of, run_missing, tuning_cases
from dag.suites import STUDIES


def reproduce(study: Study, folder: Path, seeds: int, jobs: int, cards: Sequence[str] = ()) -> list[Case]:
    """Everything that is missing of a study: tuning, runs, evaluation, figures.

    Returns:
        the runs that failed, which the figures lack.

    Raises:
        RunError: none is left, or a setting could not be tried.
    """
    tuned = tuning_cases(study, folder)
    # A setting that breaks is no choice; one that was stopped by something else has not been tried.
    broken = run_missing(tuned, jobs, cards)
    if unknown := [case for case, code in broken.items() if code != DIVERGED]:
        raise RunError(f"{len(unknown)} settings could not be tried; see {unknown[0].log}")
    cases = cases_of(study, folder, seeds, best_settings(tuned))
    failed = run_missing(cases, jobs, cards)
    done = [case for case in cases if case not in failed]
    if not done:
        raise RunError(f"every run failed; see {cases[0].log}")
    by_method = {method.name: [case for case in done if case.method == method] for method in study.methods}
    lines = [Line(name, tuple(case.rows() for case in mine)) for name, mine in by_method.items() if mine]
    write(study, folder, lines, tuned, done, _judged(study, done, folder))
    return list(failed)


def _judged(study: Study, cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """Rows of `dag.evaluate` for the base model and every run; made once for a set of runs."""
    file = folder / "evaluation" / "evaluation.json"
    if (known := _known(study, cases, file)) is not None:
        return known
    device = this_device()
    print(f"{len(cases)} runs are judged", flush=True)
    with out_of_memory_ends("out of GPU memory while judging; the same command goes on"):
        data, drawn = evaluate.evaluate(
            [case.folder for case in cases],
            device,
            num_prompts=study.prompts,
            images_per_prompt=study.images_per_prompt,
            features=cases[0].recipe().evaluation.diversity,
            distances=study.distances,
        )
    shown = {BASE, *(case.folder.name for case in cases if case.seed == 0)}
    if device.type == "cuda":
        # The next study's runs are other processes on the same card.
        free_memory()
    verdict.write(file.parent, data, {name: images for name, images in drawn.items() if name in shown})
    return data["models"]


def _known(study: Study, cases: Sequence[Case], file: Path) -> list[dict[str, Any]] | None:
    """The rows that are there, if they are of these runs' weights and as asked; None also for a file of another version."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        found = (known["num_prompts"], known["images_per_prompt"], known["distances"], known["weights"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    weights = evaluate.weights_of([case.folder for case in cases])
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
    """Figures, tables and the page."""
    table, by_name = figures.summary(lines), {one["model"]: one for one in judged}
    for row in table:
        mine = [case for case in cases if case.method.name == row["method"]]
        row |= _strengths(mine[0].recipe())
        pictures_of = [by_name[case.folder.name] for case in mine]
        for key in ("vendi", *study.distances, "frechet", "kernel", "alignment"):
            row[key] = sum(one[key] for one in pictures_of) / len(mine)
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
    drawn = figures.draw(lines, folder)
    pictures = folder / "evaluation" / "pictures.png"
    figures.page(study.title, study.question, tables, [*drawn, pictures], folder / "study.html")
    print(figures.markdown(table))
    print(f"{folder / 'study.html'}")


def _strengths(recipe: Recipe) -> dict[str, float | None]:
    """What decides how far a run goes."""
    objective = recipe.objective
    return {
        "learning_rate": recipe.train.learning_rate,
        "pretrained_kl": recipe.regulariser.pretrained_kl,
        "beta": None if isinstance(objective, PolicyGradient) else objective.beta.value,
    }


def _tried(case: Case) -> dict[str, Any]:
    """A setting of the tuning stage; one that broke has no figures."""
    setting = {"method": case.method.name, **_strengths(case.recipe())}
    ended = ("reward_last_quarter", "eval_reward", "diversity", "fidelity_top1")
    if not case.is_complete():
        return {**setting, **dict.fromkeys(ended)}
    rows = case.rows()
    final = evaluated(rows)[-1]
    return setting | {
        "reward_last_quarter": ends(rows)[1],
        "eval_reward": final["eval_reward_mean"],
        "diversity": final.get("diversity"),
        "fidelity_top1": final.get("fidelity_top1"),
    }


def _refuse_fixed(study: Study) -> None:
    """Keys that a study sets itself, run by run or for all."""
    tuned = [key for method in study.methods for setting in method.tried for key in setting.overrides]
    chosen = [*study.overrides, *(override for method in study.methods for override in method.overrides)]
    for key in map(_key, study.given):
        for own in ("seed", *tuned, *map(_key, chosen)):
            if f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}."):
                raise UsageError(f"--set {key}: the study sets {own} itself")


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _check(study: Study, folder: Path, seeds: int, jobs: int, cards: Sequence[str]) -> None:
    """What would otherwise end the study after hours."""
    _refuse_fixed(study)
    cases = [*tuning_cases(study, folder), *cases_of(study, folder, seeds, {})]
    recipes = [case.recipe() for case in cases]
    if cards and jobs > len(cards) and any(recipe.memory.budget_gib is not None for recipe in recipes):
        raise UsageError(f"--jobs {jobs}: these runs need a GPU each, and there are {len(cards)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be made: {error.strerror}") from None
    for recipe in {case.method.name: recipe for case, recipe in zip(cases, recipes, strict=True)}.values():
        check_budget(recipe)
    if not (folder / "evaluation").exists():
        features = recipes[0].evaluation.diversity
        evaluate.instruments(recipes[0], features, study.distances, torch.device("cpu"), "evaluation.diversity")


def _cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(index) for index in range(torch.cuda.device_count())]
        if named is None
        else list(filter(None, named.split(",")))
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dag.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted({name for scale in STUDIES.values() for name in scale}))
    parser.add_argument("--scale", choices=list(STUDIES), default="tiny")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each method; default: the study's, 3")
    parser.add_argument("--jobs", type=int, default=1, metavar="K", help="runs at a time, which share the CPU cores")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<name>-<scale>")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key.sub=value", help="override a key of every recipe"
    )
    parser.add_argument(
        "--distance", action="append", default=[], choices=list(DISTANCES), help="also judge by a perceptual distance"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = _parse(argv)
    # Children are stopped on the way out, which SIGTERM alone would not do.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = given.out or Path("runs") / f"{given.name}-{given.scale}"
    try:
        studies = STUDIES[given.scale].get(given.name)
        if studies is None:
            raise UsageError(f"--scale {given.scale}: {given.name} is not defined at this scale")
        if given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
            raise UsageError("--jobs and --seeds must be at least 1")
        words, distances = tuple(given.set), tuple(dict.fromkeys(given.distance))
        planned = [
            (out.resolve() / name, replace(study, given=words, distances=distances)) for name, study in studies.items()
        ]
        cards = _cards()
        for folder, study in planned:
            _check(study, folder, given.seeds or study.seeds, given.jobs, cards)
        problems = []
        for folder, study in planned:
            try:
                failed = reproduce(study, folder, given.seeds or study.seeds, given.jobs, cards)
                problems += [f"{case.folder.name} failed and is missing in the figures" for case in failed]
            except RunError as error:
                problems.append(f"{folder.name}: {error}")
        if problems:
            raise RunError("; ".join(problems))
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
