"""Studies on the embedded model: only missing runs are run, and figures are drawn from what was measured."""

import csv
import fcntl
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.forked import exit_code, forked

import train_dag
from dag import reproduce
from dag.costs.forecast import check_budget
from dag.errors import RunError, UsageError
from dag.evaluation import perceptual
from dag.evaluation.curves import at_reward, ends
from dag.evaluation.figures import Line, common_reward, draw, markdown, summary
from dag.evaluation.study import (
    Case,
    Method,
    Setting,
    Study,
    _command,
    best_settings,
    cases_of,
    run_missing,
    tuning_cases,
)
from dag.recipe import Recipe

ROOT = Path(__file__).parents[2]
without_lpips = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is not None, reason="torchmetrics is installed"
)
SHORT = (
    *("model.resolution=32", "train.epochs=2", "train.trajectories=4", "train.micro_batch=4", "sampler.steps=3"),
    *("evaluation.prompts=1", "evaluation.images_per_prompt=2", "evaluation.every=1", "checkpoint.every=1"),
    *("regulariser.pretrained_kl=0",),
)
STUDY = Study(
    title="A <small> study",
    question="Does it run?",
    methods=(
        Method("dag_db", "tiny_cpu_db.yaml", ("flow.passes=0",), tried=(Setting(0.001), Setting(0.002))),
        Method("ddpo", "tiny_cpu_ddpo.yaml"),
    ),
    overrides=SHORT,
    prompts=2,
    images_per_prompt=2,
)

LONG = 5
LONGER = replace(STUDY, methods=STUDY.methods[1:], overrides=(*STUDY.overrides, f"train.epochs={LONG}"))


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs get a thread each: other tests are at work beside them."""
    monkeypatch.setattr("dag.evaluation.study.num_cores", lambda: 1)


# -- curves -------------------------------------------------------------------------------------------------------


def rows_of(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl whose fixed evaluations have (reward, diversity); rollouts, from epoch 1 on, have that reward."""
    return [
        {
            "epoch": epoch,
            "trajectories": 10 * epoch,
            "optimizer_step": epoch,
            "eval_reward_mean": reward,
            "diversity": diversity,
            "seconds_update": 2.0,
            **({"reward_mean": reward} if epoch else {}),
        }
        for epoch, (reward, diversity) in enumerate(points)
    ]


def test_diversity_is_read_where_a_reward_is_first_reached() -> None:
    rows = rows_of((1.0, 0.9), (3.0, 0.5), (2.0, 0.8), (4.0, 0.1))
    assert at_reward(rows, 2.0, "diversity") == pytest.approx(0.7)
    assert at_reward(rows, 0.5, "diversity") == pytest.approx(0.9), "reached before training"
    assert at_reward(rows, 3.5, "diversity") == pytest.approx(0.8 + (0.1 - 0.8) * 0.75)
    assert at_reward(rows, 4.5, "diversity") is None
    assert at_reward(rows, 2.0, "noun_top1") is None


def test_a_summary_compares_methods_where_all_of_them_have_been() -> None:
    lines = [
        Line("quick", (rows_of((1, 0.9), (3, 0.5), (5, 0.3)), rows_of((1, 0.9), (2, 0.8), (6, 0.4)))),
        Line("slow", (rows_of((1, 0.9), (2, 0.8), (3, 0.7)),)),
    ]
    assert common_reward(lines) == 3
    quick, slow = summary(lines)
    assert (quick["reward_first"], quick["reward_last_quarter"]) == (2.5, 5.5)
    assert quick["reward_last_quarter_sd"] == pytest.approx(0.5**0.5)
    assert (quick["equal_reward"], slow["equal_reward"]) == (3, 3)
    assert quick["diversity_at_equal_reward"] == pytest.approx((0.5 + 0.7) / 2)
    assert slow["diversity_at_equal_reward"] == pytest.approx(0.7)
    assert slow["reward_last_quarter_sd"] is None, "one seed has no spread"
    assert (slow["trajectories"], slow["updates"], slow["seconds"]) == (20, 2, 6.0)
    assert markdown([quick, slow]).count("\n") == 3
    assert ends(rows_of(*((reward, 0.5) for reward in range(9)))) == (1, 7.5)


def test_nothing_is_compared_at_a_reward_that_needs_no_training() -> None:
    lines = [Line("quick", (rows_of((1, 0.9), (3, 0.5)),)), Line("never", (rows_of((1, 0.9), (0, 0.5)),))]
    assert common_reward(lines) is None
    assert all(row["diversity_at_equal_reward"] is None for row in summary(lines))


def test_a_dozen_methods_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    draw([Line(str(index), (rows_of((1, 0.9), (2, 0.8)),)) for index in range(12)], tmp_path)
    monkeypatch.undo()
    for figure in kept[:3]:
        assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == 12
    pyplot.close("all")


def test_a_front_joins_the_settings_that_a_method_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    tried = [rows_of((1, 0.9), (reward, diversity)) for reward, diversity in ((4, 0.4), (2, 0.8), (3, 0.6))]
    drawn = [path.stem for path in draw([Line("a", tuple(tried))], tmp_path, [Line("a", tuple(tried))])]
    assert "fronts_diversity" in drawn
    assert "fronts_noun_top1" not in drawn, "not measured"
    titles = {figure.axes[0].get_xlabel(): figure.axes[0] for figure in kept}
    (front,) = [line for figure in kept for axis in figure.axes for line in axis.lines if len(line.get_xdata()) == 3]
    assert front.get_xydata().tolist() == [[0.4, 4], [0.6, 3], [0.8, 2]]
    # The first epoch's rollout was sampled before any training; these epochs take two seconds each.
    assert titles["seconds of training before"].lines[0].get_xdata().tolist() == [0]
    monkeypatch.undo()
    pyplot.close("all")


def test_a_setting_names_what_it_changes() -> None:
    assert Setting(0.001, 1e-5).name == "lr0.001-kl1e-05"
    assert Setting(beta=3.0).name == "beta3.0"
    assert Setting(beta=3.0).overrides == {"objective.beta.value": 3.0}


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    rows = rows_of((1, 0.9), (2, 0.8))
    drawn = {path.stem for path in draw([Line("a", (rows, rows))], tmp_path)}
    assert "reward_against_diversity" in drawn
    assert "reward_against_noun_top1" not in drawn
    assert all((tmp_path / f"{name}.svg").exists() for name in drawn)


# -- definitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(reproduce.STUDIES))
def test_every_run_of_every_study_has_a_valid_recipe_and_a_folder_of_its_own(scale: str, tmp_path: Path) -> None:
    for study in (study for studies in reproduce.STUDIES[scale].values() for study in studies.values()):
        settings = {method.name: (method.tried or (None,))[0] for method in study.methods}
        cases = [*cases_of(study, tmp_path, 2, settings), *tuning_cases(study, tmp_path)]
        assert len({case.folder for case in cases}) == len({(c.method, c.seed, c.setting) for c in cases})
        recipes = [case.recipe() for case in cases]
        # Recipes of `recipes/tiny/` have equal work instead.
        tiny = reproduce.STUDIES["tiny"]
        is_equal_work = any(study is one for name in ("zoo", "flow") for one in tiny[name].values())
        assert is_equal_work or len({recipe.train.trajectories * recipe.train.epochs for recipe in recipes}) == 1
        assert [recipe.seed for recipe in recipes] == [case.seed for case in cases]
        for setting, recipe in ((c.setting, r) for c, r in zip(cases, recipes, strict=True) if c.setting is not None):
            assert setting.learning_rate in (None, recipe.train.learning_rate)
            assert setting.beta is None or setting.beta == recipe.target.beta.value  # type: ignore[union-attr]
            assert setting.pretrained_kl in (None, recipe.regulariser.pretrained_kl)


def test_the_zoo_has_every_objective_at_equal_work() -> None:
    """Each file states its work: trajectories x guided forward passes of the denoiser, sampled, trained and compared with."""
    from dag.objectives import OBJECTIVES
    from dag.training.plan import training_passes

    names = set()
    for method in reproduce.STUDIES["tiny"]["zoo"]["colourfulness"].methods:
        recipe = cases_of(Study("t", "q", (method,)), Path("x"), 1, {})[0].recipe()
        names.add(recipe.objective.name)
        if method.recipe.startswith("tiny/"):
            text = (ROOT / "recipes" / method.recipe).read_text()
            stated = re.search(r"(\d+) trajectories x ([\d.]+) = ([\d,]+)", text)
            assert stated is not None, method.recipe
            work = float(stated[3].replace(",", ""))
            assert int(stated[1]) == recipe.train.trajectories * recipe.train.epochs
            assert work == pytest.approx(int(stated[1]) * float(stated[2]), abs=1)
            assert work == pytest.approx(training_passes(recipe), abs=1), method.recipe
            # A penalty on the KL to the pretrained model takes one pass more for each trained transition.
            assert 7_700 < work < (10_000 if recipe.regulariser.pretrained_kl > 0 else 8_800), method.recipe
    assert names == set(OBJECTIVES)


@pytest.mark.parametrize("name", ["unregularised", "regularised"])
def test_a_comparison_differs_in_the_objective_alone(name: str) -> None:
    """The methods have the same trajectories and updates, and try equally many settings with the same learning rates."""
    study = reproduce.STUDIES["tiny"]["comparison"][name]
    for tried in zip(*(method.tried for method in study.methods), strict=True):
        settings = {method.name: setting for method, setting in zip(study.methods, tried, strict=True)}
        first, *others = cases = [case.recipe() for case in cases_of(study, Path("x"), 1, settings)]
        assert [recipe.regulariser.pretrained_kl for recipe in cases] == [s.pretrained_kl or 0 for s in tried]
        assert first.regulariser.sampling == 0
        for other in others:
            strength = first.regulariser.pretrained_kl
            pull = other.regulariser.model_copy(update={"pretrained_kl": strength})
            same = {"objective": first.objective, "flow": first.flow, "regulariser": pull}
            assert other.model_copy(update=same) == first


# -- running ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has run."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dag.evaluation.reproduce.run_missing", run_here)
        patch.setitem(reproduce.STUDIES["tiny"], "comparison", {"short": STUDY})
        assert reproduce.main(["comparison", "--seeds", "1", "--out", str(out)]) == 0
    return out


def run_here(cases: Sequence[Case], jobs: int, gpus: Sequence[str] = ()) -> dict[Case, int]:
    """`run_missing` without a process for each run, whose start takes longer than the run."""
    for case in cases:
        assert train_dag.main(_command(case)[2:]) == 0
    return {}


def trained_at_once(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    """Let the process of a run put a trained run in its place; that of a run named broken fails."""
    move = (
        "import sys; from shutil import copytree; 'broken' in sys.argv[2] and sys.exit('no'); copytree(*sys.argv[1:])"
    )
    monkeypatch.setattr(
        "dag.evaluation.study._command", lambda case: [sys.executable, "-c", move, str(trained), str(case.folder)]
    )


def again(done: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setitem(reproduce.STUDIES["tiny"], "comparison", {"short": STUDY})
    return reproduce.main(["comparison", "--seeds", "1", "--out", str(done), *options])


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without times and memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "memory", "peak"))} for row in rows]


def test_a_study_leaves_figures_tables_and_one_page(done: Path) -> None:
    folder = done / "short"
    assert {path.name for path in folder.glob("*-s0")} == {"dag_db-lr0.001-s0", "dag_db-lr0.002-s0", "ddpo-s0"}
    with (folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == ["dag_db", "ddpo"]
    assert float(table[0]["learning_rate"]) in (0.001, 0.002)
    assert [row["beta"] for row in table] == ["1000.0", ""], "DDPO has none"
    assert all(float(row["frechet"]) > 0 and float(row["vendi"]) >= 1 for row in table)
    with (folder / "curves.csv").open() as file:
        assert {(row["method"], row["epoch"]) for row in csv.DictReader(file)} == {
            (method, str(epoch)) for method in ("dag_db", "ddpo") for epoch in range(3)
        }
    page = (folder / "study.html").read_text()
    assert "A &lt;small&gt; study" in page
    assert page.count("data:image/png;base64,") == 9
    assert "http" not in page.replace("http-equiv", ""), "everything is in the file"


def test_what_is_done_is_not_done_again(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = done / "short"
    missing, kept = folder / "ddpo-s0", folder / "dag_db-lr0.001-s0"
    untouched = (kept / "metrics.jsonl").stat().st_mtime_ns
    judged = (folder / "evaluation/evaluation.json").stat().st_mtime_ns
    trained_at_once(monkeypatch, missing.rename(done / "trained"))
    assert again(done, monkeypatch) == 0
    started = [line for line in capsys.readouterr().out.splitlines() if "started" in line or "resumed" in line]
    assert started == ["ddpo-s0: started"]
    assert missing.is_dir()
    assert (kept / "metrics.jsonl").stat().st_mtime_ns == untouched
    assert (folder / "evaluation/evaluation.json").stat().st_mtime_ns == judged


def test_a_study_killed_in_the_middle_goes_on_where_it_was(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reproduce.STUDIES["tiny"], "comparison", {"short": LONGER})
    run = tmp_path / "short" / "ddpo-s0"
    first = forked(reproduce.main, ["comparison", "--seeds", "1", "--out", str(tmp_path)], tmp_path / "log")
    while len((run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ()) < 3:
        assert os.waitpid(first, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    os.kill(first, signal.SIGTERM)
    assert exit_code(first) == 128 + signal.SIGTERM
    stopped = len(metrics(run))
    assert stopped <= LONG
    cases = cases_of(LONGER, tmp_path / "short", 1, {})
    assert "--resume" in _command(cases[0])
    run_here(cases, 1)
    assert [row["epoch"] for row in metrics(run)] == list(range(LONG + 1))
    assert metrics(run)[1:3] == metrics(done / "short" / "ddpo-s0")[1:3], "the same run as without the stop"


def test_a_run_that_is_being_trained_is_left_alone(tmp_path: Path) -> None:
    case = cases_of(STUDY, tmp_path, 1, {"dag_db": Setting(0.001)})[0]
    with (tmp_path / f"{case.folder.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is training it"):
            run_missing([case], 1)
    assert not case.folder.exists()


def test_a_folder_with_another_recipes_run_is_refused(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(done, monkeypatch, "--set", "train.clip_norm=2") == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_go_on(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = (Method("broken", "tiny_cpu_ddpo.yaml"), Method("working", "tiny_cpu_ddpo.yaml"))
    cases = cases_of(Study("t", "q", methods, SHORT), tmp_path / "study", 1, {})
    trained_at_once(monkeypatch, done / "short" / "ddpo-s0")
    assert run_missing(cases, 1) == {cases[0]: 1}
    assert cases[1].is_complete()
    log = tmp_path / "study" / "broken-s0.log"
    assert f"broken-s0: failed, see {log}" in capsys.readouterr().out
    assert log.read_text() == "no\n"


def test_tuning_takes_the_highest_reward_among_those_that_keep_the_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {0.001: (2.0, 0.9), 0.002: (5.0, 0.3)}

    def read(case: Any) -> list[dict[str, Any]]:
        reward, kept = rows[case.setting.learning_rate]
        return [{"reward_mean": reward, "eval_reward_mean": reward, "noun_top1": kept}]

    monkeypatch.setattr("dag.evaluation.study.Case.metrics", read)
    monkeypatch.setattr("dag.evaluation.study.Case.is_complete", lambda case: case.setting.learning_rate in rows)
    tuned = tuning_cases(STUDY, Path("x"))
    assert best_settings(tuned) == {"dag_db": Setting(0.001)}
    rows[0.002] = (5.0, 0.71)
    assert best_settings(tuned) == {"dag_db": Setting(0.002)}
    rows[0.001], rows[0.002] = (2.0, 0.2), (5.0, 0.1)
    assert best_settings(tuned) == {"dag_db": Setting(0.001)}, "none keeps it: the one that keeps it best"
    del rows[0.001]
    assert best_settings(tuned) == {"dag_db": Setting(0.002)}, "one that broke is no choice"
    rows.clear()
    with pytest.raises(RunError, match="no setting of dag_db was trained to the end"):
        best_settings(tuned)


def test_keys_that_a_study_sets_itself_are_refused(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, own in (
        ("seed=5", "seed"),
        ("train.learning_rate=1e-3", "train.learning_rate"),
        ("train={learning_rate: 1e-3}", "train."),
        ("flow.passes=1", "flow.passes"),
        ("regulariser.pretrained_kl=1", "regulariser.pretrained_kl"),
    ):
        assert again(done, monkeypatch, "--set", override) == 2
        assert f"the study sets {own}" in capsys.readouterr().err
    case = cases_of(replace(STUDY, given=("train.epochs=1",)), done, 1, {})[1]
    assert case.recipe().train.epochs == 1, "the user's own come last"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.epoch=3"], "train.epoch"),
        (["--set", "evaluation.diversity=/nowhere"], "evaluation.diversity: there is no file or folder /nowhere"),
        pytest.param(["--distance", "lpips"], "[perceptual]", marks=without_lpips),
    ],
)
def test_what_would_fail_after_training_fails_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("dag.evaluation.reproduce.run_missing", lambda *given: pytest.fail("trained"))
    assert reproduce.main(["figure3", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_largest_runs_of_the_paper_fit_in_their_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = reproduce.STUDIES["paper"]["figure3"]["hpsv2"]
    recipe = cases_of(largest, tmp_path, 1, {})[0].recipe()
    assert recipe.memory.budget_gib == 21
    check_budget(recipe)

    def refuse(recipe: Recipe) -> None:
        raise UsageError(f"memory.budget_gib={recipe.memory.budget_gib}: too little")

    monkeypatch.setattr(reproduce, "check_budget", refuse)
    monkeypatch.setattr("dag.evaluation.reproduce.run_missing", lambda *given: pytest.fail("trained"))
    options = ["figure4", "--scale", "paper", "--out", str(tmp_path), "--set", "memory.budget_gib=4"]
    assert reproduce.main(options) == 2
    assert "memory.budget_gib=4.0: too little" in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert reproduce.main(["figure3", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_run_that_fails_is_missing_in_the_figures_and_said(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "dag.evaluation.reproduce.run_missing",
        lambda cases, *_: {case: 1 for case in cases if case.method.name == "ddpo"},
    )
    assert again(done, monkeypatch) == 1
    assert "ddpo-s0 failed and is missing in the figures" in capsys.readouterr().err
    with (done / "short" / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["dag_db"]


def test_a_setting_that_was_not_tried_is_not_passed_over(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dag.evaluation.reproduce.run_missing", lambda cases, *_: {cases[0]: 1})
    assert again(done, monkeypatch) == 1
    assert "1 settings could not be tried" in capsys.readouterr().err


def test_jobs_share_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(1)"
    monkeypatch.setattr("dag.evaluation.study._command", lambda case: [sys.executable, "-c", say])
    cases = cases_of(STUDY, tmp_path, 2, {})
    assert set(run_missing(cases, 2, ("3", "GPU-7")).values()) == {1}
    assert {case.log.read_text().strip() for case in cases} == {"3", "GPU-7"}
    monkeypatch.setattr(reproduce, "_gpus", lambda: ["0"])
    options = ["figure3", "--scale", "paper", "--jobs", "2", "--out", str(tmp_path / "o")]
    assert reproduce.main(options) == 2
    assert "these runs need a GPU each, and there are 1" in capsys.readouterr().err


def test_judgement_belongs_to_the_weights(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = done / "short" / "evaluation" / "evaluation.json"
    judged = json.loads(file.read_text())
    judged["weights"]["ddpo-s0"] = "of another training"
    file.write_text(json.dumps({**judged, "models": []}))
    assert again(done, monkeypatch) == 0
    assert len(json.loads(file.read_text())["models"]) == 4


def test_a_perceptual_distance_becomes_a_column(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(perceptual.DISTANCES, "pixels", lambda device: lambda a, b: (a - b).abs().mean())
    assert again(done, monkeypatch, "--distance", "pixels") == 0
    with (done / "short" / "table.csv").open() as file:
        assert all(0 < float(row["pixels"]) < 1 for row in csv.DictReader(file))


def test_a_study_of_another_scale_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["ablations", "--scale", "paper"]) == 2
    assert "ablations is not defined at this scale" in capsys.readouterr().err
