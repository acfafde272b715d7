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
import gc
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dag import evaluate, figures
from dag.curves import ends, evaluated
from dag.errors import RunError, UsageError, exit_code
from dag.figures import Line
from dag.perceptual import DISTANCES
from dag.study import Case, Method, Setting, Study, best_settings, cases_of, run_missing, tuning_cases

_DDPO_AT_PAPER_SCALE = (
    "objective={name: ddpo, clip_range: 1e-4, advantage_clip: 5, per_prompt: 32}",
    "sampler.log_pf_at=stored",
    "regulariser.sampling=0",
)
_TINY = (
    Method("dag_db", "tiny_cpu.yaml"),
    Method("dag_kl", "tiny_cpu_kl.yaml"),
    Method("ddpo", "tiny_cpu_ddpo.yaml"),
)


def _paper(name: str) -> tuple[Method, ...]:
    """The published recipes on a reward's prompts: animals for networks, ImageNet's classes for JPEG."""
    file = "compressibility" if "compressibility" in name else "aesthetic"
    return (
        Method("dag_db", f"paper/{file}.yaml"),
        Method("dag_kl", f"paper/{file}_kl.yaml"),
        Method("ddpo", f"paper/{file}.yaml", _DDPO_AT_PAPER_SCALE),
    )


# The published micro-batch of 8 asks for more than 24 GB; the gradient does not depend on it.
_ON_24_GB = ("train.micro_batch=4", "memory.budget_gib=21", "evaluation.diversity=openai/clip-vit-large-patch14")
_CHOICE = "the reward of the last quarter decides among those that keep the judged noun in 70 % of pictures"
_WITHOUT = tuple(Setting(rate) for rate in (0.002, 0.004, 0.008))
# The pull of a strength depends on the loss beside it: a decade for each, near what its recipe ships with.
_STRENGTHS = {"dag_db": (1e-5, 1e-4), "dag_kl": (1e-5, 1e-4), "ddpo": (1e-6, 1e-5)}


def _regularised(method: Method) -> Method:
    pairs = (Setting(rate, strength) for strength in _STRENGTHS[method.name] for rate in (0.004, 0.008))
    return replace(method, tried=tuple(pairs))


def _reward(name: str, title: str, scale: str) -> Study:
    is_tiny = scale == "tiny"
    return Study(
        title=f"{title}, {'embedded model' if is_tiny else 'Stable Diffusion 1.5'}",
        question="Reward against trajectories of DAG-DB, DAG-KL and DDPO, with each recipe's own settings.",
        methods=_TINY if is_tiny else _paper(name),
        overrides=(f"reward={{name: {name}}}", "evaluation.every=4" if is_tiny else "evaluation.every=10")
        + (() if is_tiny else _ON_24_GB),
    )


_ABLATIONS = (
    Method("dag_db", "tiny_cpu.yaml"),
    Method("no_forward_looking", "tiny_cpu.yaml", ("objective.forward_looking.source=none",)),
    Method("current_x0_hat", "tiny_cpu.yaml", ("objective.forward_looking.source=current",)),
    Method("one_pass", "tiny_cpu.yaml", ("train.rollout=one_pass",)),
    Method("dag_kl", "tiny_cpu_kl.yaml", ("train.learning_rate=5e-3", "regulariser.pretrained_kl=1.2e-4")),
    Method("beta_quarter", "tiny_cpu.yaml", ("objective.beta.value=250",)),
    Method("beta_fourfold", "tiny_cpu.yaml", ("objective.beta.value=4000",)),
    Method("next_flow_trained", "tiny_cpu.yaml", ("objective.detach_next=false",)),
    Method("mean_log_probs", "tiny_cpu.yaml", ("objective.log_prob_reduction=mean",)),
)

STUDIES: dict[str, dict[str, dict[str, Study]]] = {
    "tiny": {
        "figure3": {"image_text": _reward("image_text", "Image-text score", "tiny")},
        "figure4": {
            "compressibility": _reward("compressibility", "JPEG compressibility", "tiny"),
            "incompressibility": _reward("incompressibility", "JPEG incompressibility", "tiny"),
        },
        "comparison": {
            "unregularised": Study(
                title="DAG-DB, DAG-KL and DDPO at the same budget, without a regulariser",
                question="Same trajectories, same reward (colourfulness), no regulariser for any, and the best of three "
                f"learning rates: {_CHOICE}.",
                methods=tuple(replace(method, tried=_WITHOUT) for method in _TINY),
                overrides=("regulariser.pretrained_kl=0", "evaluation.every=4"),
            ),
            "regularised": Study(
                title="DAG-DB, DAG-KL and DDPO at the same budget, each with its regulariser",
                question="Same trajectories, same reward (colourfulness), and for each the best of four pairs of learning "
                f"rate and regulariser strength: {_CHOICE}. Losses differ in scale, so each has its own two strengths.",
                methods=tuple(map(_regularised, _TINY)),
                overrides=("evaluation.every=4",),
            ),
        },
        "ablations": {
            "colourfulness": Study(
                title="One choice at a time",
                question="recipes/tiny_cpu.yaml (dag_db), and what changes if one of its choices does.",
                methods=_ABLATIONS,
                overrides=("evaluation.every=4",),
            )
        },
    },
    "paper": {
        "figure3": {
            "aesthetic": _reward("aesthetic", "LAION's aesthetic score", "paper"),
            "image_reward": _reward("image_reward", "ImageReward", "paper"),
            "hpsv2": _reward("hpsv2", "Human Preference Score v2.1", "paper"),
        },
        "figure4": {
            "compressibility": _reward("compressibility", "JPEG compressibility", "paper"),
            "incompressibility": _reward("incompressibility", "JPEG incompressibility", "paper"),
        },
    },
}


def reproduce(study: Study, folder: Path, seeds: int, jobs: int) -> None:
    """Everything that is missing of a study: tuning, runs, evaluation, figures."""
    folder.mkdir(parents=True, exist_ok=True)
    tuned = tuning_cases(study, folder)
    run_missing(tuned, jobs)  # a setting that breaks is not chosen
    cases = cases_of(study, folder, seeds, best_settings(tuned))
    if failed := run_missing(cases, jobs):
        raise RunError(f"{len(failed)} of {len(cases)} runs failed: {', '.join(case.folder.name for case in failed)}")
    lines = [
        Line(method.name, tuple(case.rows() for case in cases if case.method == method)) for method in study.methods
    ]
    judged = _judged(study, cases, folder)
    write(study, folder, lines, tuned, cases, judged)


def _judged(study: Study, cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """Rows of `dag.evaluate` for the base model and every run; made once for a set of runs."""
    file = folder / "evaluation" / "evaluation.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        asked = (study.prompts, study.images_per_prompt, sorted(study.distances))
        is_as_asked = (len(known["prompts"]), known["images_per_prompt"], known.get("distances", [])) == asked
        if is_as_asked and known["weights"] == evaluate.weights_of([case.folder for case in cases]):
            return known["models"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{len(cases)} runs are judged", flush=True)
    features = None if cases[0].recipe().model.path == "embedded" else "openai/clip-vit-large-patch14"
    data, drawn = evaluate.evaluate(
        [case.folder for case in cases],
        device,
        num_prompts=study.prompts,
        images_per_prompt=study.images_per_prompt,
        features=features,
        distances=study.distances,
    )
    shown = {
        name
        for name in drawn
        if name == evaluate.BASE or name in {case.folder.name for case in cases if case.seed == 0}
    }
    if device.type == "cuda":
        # The next study's runs are other processes on the same card.
        gc.collect()
        torch.cuda.empty_cache()
    evaluate.write(file.parent, data, {name: images for name, images in drawn.items() if name in shown})
    return data["models"]


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
        row["learning_rate"] = mine[0].recipe().train.learning_rate
        row["pretrained_kl"] = mine[0].recipe().regulariser.pretrained_kl
        pictures_of = [by_name[case.folder.name] for case in mine]
        for key in ("vendi", *study.distances, "frechet", "kernel", "alignment"):
            row[key] = sum(one[key] for one in pictures_of) / len(mine)
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


def _tried(case: Case) -> dict[str, Any]:
    """A setting of the tuning stage; one that broke has no figures."""
    recipe = case.recipe()
    setting = {
        "method": case.method.name,
        "learning_rate": recipe.train.learning_rate,
        "pretrained_kl": recipe.regulariser.pretrained_kl,
    }
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


def _refuse_fixed(study: Study, given: Sequence[str]) -> None:
    """Keys that a study sets itself, run by run."""
    tuned = {key for method in study.methods for setting in method.tried for key in setting.overrides}
    fixed = {"seed"} | tuned
    for override in given:
        if (key := override.partition("=")[0].strip()) in fixed:
            raise UsageError(f"--set {key}: the study sets it itself, run by run")


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
        for name, study in studies.items():
            _refuse_fixed(study, given.set)
            changed = replace(study, given=tuple(given.set), distances=tuple(dict.fromkeys(given.distance)))
            reproduce(changed, out.resolve() / name, given.seeds or study.seeds, given.jobs)
    except (UsageError, RunError) as error:
        return exit_code(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
