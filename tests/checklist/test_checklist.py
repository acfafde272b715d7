"""The checklist: what it leaves behind however it ends (with stub stages, which take no time), and its real commands."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dag import bench
from dag.checklist import missing, runner, stages, trial_run
from dag.checklist.runner import Checklist
from dag.checklist.stages import Stage
from dag.costs import ablation, commands
from dag.costs.train_step import LITERAL
from dag.errors import RunError, UsageError
from dag.recipe import Recipe
from dag.recipe.load import load, parse_reward
from dag.rewards import build_reward, checked
from dag.rewards.stand_in import StandIn

ROOT = Path(__file__).parents[2]
HERE = {"gpu": "a GPU, 24.0 GiB", "commit": "abc"}
# The program of a stub stage, `python -m stub_stage WORD FOLDER NAME`. It counts its starts; WORD says how it behaves.
# `table` is that of dag_kernels, whose own import would be one of torch, which takes seconds.
STUB = """
import os, subprocess, sys, time
from pathlib import Path
import table
word, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
counter = Path(os.environ["STUB_COUNTS"]) / name
counter.write_text(counter.read_text() + "x" if counter.exists() else "x")
def row(label, **figures):
    table.append(folder / "training.csv", {"stage": name, "label": label, **figures})
row("first", ms_total=1.5)
if word == "error":
    row("second", error="out of memory")
if word == "raises" and len(counter.read_text()) == 1:
    print("halfway")
    raise RuntimeError("the GPU fell off\\nand more is said\\n")
if word == "hangs" and len(counter.read_text()) == 1:
    child = subprocess.Popen(["sleep", "300"])
    (Path(os.environ["STUB_COUNTS"]) / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(300)
row("last", ms_total=2.5)
"""


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file for each stub stage, which holds an x for each time that it started."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "stub_stage.py").write_text(STUB)
    (tmp_path / "counts").mkdir()
    (tmp_path / "stubs" / "table.py").symlink_to(ROOT / "kernels/dag_kernels/table.py")
    paths = [str(tmp_path / "stubs"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("STUB_COUNTS", str(tmp_path / "counts"))
    monkeypatch.setattr(runner, "machine", lambda: dict(HERE))
    return tmp_path / "counts"


def stub(name: str, word: str = "rows", share: float = 60.0) -> Stage:
    command = ("stub_stage", word, "{folder}", name)
    return Stage(name, f"what {name} is", command, "training.csv", share, ("label", "ms_total", "error"))


def lines_of(folder: Path) -> dict[str, str]:
    """The line of each stage in summary.md, by the stage's name."""
    text = (folder / "summary.md").read_text()
    return dict(re.findall(r"^- (\w+): (.*)$", text, re.MULTILINE))


def labels(folder: Path, name: str) -> list[str]:
    with (folder / "training.csv").open() as file:
        return [row["label"] for row in csv.DictReader(file) if row["stage"] == name]


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stages_that_end_in_every_way(tmp_path: Path, counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    chosen = [stub("good"), stub("partly", "error"), stub("broken", "raises"), stub("afterwards")]
    assert runner.run(out, 10, True, chosen) == 1
    said = lines_of(out)
    assert re.fullmatch(r"done in \d+ s, 2 rows", said["good"])
    assert re.fullmatch(r"done in \d+ s, 3 rows, of which 1 could not be measured", said["partly"])
    assert said["broken"] == ("FAILED: RuntimeError: the GPU fell off (1 row; logs.txt, after `==== broken`)"), (
        "its error, and the row it had before"
    )
    assert said["afterwards"].startswith("done"), "a stage that fails stops no other"
    text = (out / "summary.md").read_text()
    assert text.startswith("# Checklist: a GPU, 24.0 GiB\n")
    assert "| second |  | out of memory |" in text
    assert "Traceback" in (out / "logs.txt").read_text()
    assert text in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "checklist.json", "logs.txt", "summary.md", "training.csv",
    ]  # fmt: skip


def test_what_is_done_is_not_run_again(tmp_path: Path, counts: Path) -> None:
    out, chosen = tmp_path / "out", [stub("good"), stub("broken", "raises")]
    assert runner.run(out, 10, True, chosen) == 1
    assert runner.run(out, 10, True, chosen) == 0
    assert (counts / "good").read_text() == "x"
    assert (counts / "broken").read_text() == "xx"
    assert labels(out, "good") == labels(out, "broken") == ["first", "last"], "rows of the first attempt are gone"
    assert set(lines_of(out)) == {"good", "broken"}
    assert all(line.startswith("done") for line in lines_of(out).values())


def test_a_stage_that_overruns_is_killed_with_what_it_started(
    tmp_path: Path, counts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the killed stage stay. A stage for which too little time is left is not started."""
    monkeypatch.setattr(runner, "LEAST_SECONDS", 3.0)
    out, chosen = tmp_path / "out", [stub("slow", "hangs", 20), stub("late", share=3)]
    assert runner.run(out, 12 / 60, True, chosen) == 1
    said = lines_of(out)
    assert said["slow"] == "FAILED: over its 10 s (1 row; logs.txt, after `==== slow`)"
    assert re.fullmatch(r"not measured: [012] s were left for it; the same command goes on from here", said["late"])
    assert not (counts / "late").exists()
    for process in map(int, (counts / "pids").read_text().split()):
        wait_for(lambda process=process: not is_alive(process))  # type: ignore[misc]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_killed_in_the_middle(tmp_path: Path, counts: Path, number: signal.Signals) -> None:
    """The folder is readable and says what is missing, no process is left, and the same command continues from there."""
    out, chosen = tmp_path / "out", [stub("good"), stub("slow", "hangs"), stub("never")]
    program = f"""
        import sys
        from pathlib import Path
        from dag.checklist import runner
        from dag.checklist.stages import Stage
        runner.machine = lambda: {HERE!r}
        sys.exit(runner.run(Path({str(out)!r}), 10, True, {chosen!r}))
    """
    running = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((counts / "pids").exists)
    wait_for(lambda: len((counts / "pids").read_text().split()) == 2)
    with pytest.raises(UsageError, match="still running there"):
        runner.run(out, 10, True, chosen)
    running.send_signal(number)
    assert running.wait() == (-number if number == signal.SIGKILL else 128 + number)
    stage, child = map(int, (counts / "pids").read_text().split())
    wait_for(lambda: not is_alive(stage))
    if number == signal.SIGTERM:
        wait_for(lambda: not is_alive(child))
    elif is_alive(child):
        os.kill(child, signal.SIGKILL)  # the process that the stage started, which the runner's death does not end
        wait_for(lambda: not is_alive(child))
    said = lines_of(out)
    assert said["good"].startswith("done")
    assert re.fullmatch(r"not measured: it began with \d+ s and did not end \(.*it is still running, or was killed\)",
                        said["slow"])  # fmt: skip
    assert said["never"] == "not measured: it was not reached"
    assert labels(out, "slow") == ["first"]
    assert runner.run(out, 10, True, chosen) == 0
    assert (counts / "good").read_text() == "x"
    assert labels(out, "slow") == ["first", "last"]


@pytest.mark.parametrize("changed", [{"gpu": "another GPU"}, {"commit": "def"}, {"torch": "3.0"}], ids=str)
def test_another_machine_or_version_is_refused(
    tmp_path: Path,
    counts: Path,
    changed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(runner, "stages", lambda has_gpu: [stub("good"), stub("more")])
    assert runner.run(out, 10, True, [stub("good")]) == 0
    before = (out / "summary.md").read_text(), (out / "checklist.json").read_text()
    monkeypatch.setattr(runner, "machine", lambda: HERE | changed)
    capsys.readouterr()
    assert bench.main(["checklist", str(out)]) == 2
    (name, now), said = next(iter(changed.items())), capsys.readouterr().err
    was = HERE.get(name)
    assert said == f"error: {out}: was measured elsewhere ({name} {was} then, {now} now); choose another folder\n"
    assert before == ((out / "summary.md").read_text(), (out / "checklist.json").read_text())


def test_mistakes_are_one_line(tmp_path: Path, counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "checklist.json").write_text('{"mach')
    said = {
        ("checklist", "file"): "file: cannot write there: ",
        ("checklist", "torn"): "checklist.json: cannot be read (",
        ("missing", "counts"): "counts: no checklist there (checklist.json is missing)",
    }
    for (command, name), expected in said.items():
        assert bench.main([command, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected in error
    assert bench.main(["checklist", str(tmp_path / "new"), "--minutes", "0"]) == 2
    assert capsys.readouterr().err == "error: --minutes 0: must be above 0\n"


def test_the_machine_is_described_by_a_process_of_its_own() -> None:
    found = runner.machine()
    assert {"gpu", "cuda", "torch", "commit", "device"} <= found.keys()
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert (found["gpu"] is None) == (not torch.cuda.is_available())


# -- the real stages ----------------------------------------------------------------------------------------------

EVERY = [(has_gpu, stage) for has_gpu in (True, False) for stage in stages.stages(has_gpu)]


@pytest.mark.parametrize(("has_gpu", "stage"), EVERY, ids=lambda value: getattr(value, "name", str(value)))
def test_a_stages_command_is_one(has_gpu: bool, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a GPU: the options exist, the recipes load with every override, rows go where the summary looks."""
    monkeypatch.chdir(ROOT)
    module, *words = stage.command
    if module == "dag_kernels.bench":
        assert words == ["--checklist", "{folder}"]
        return
    given = bench._parser().parse_args(words)
    assert (str(given.csv), given.stage) == (f"{{folder}}/{stage.file}", stage.name)
    if given.command == "trial":
        recipes = [
            load(given.recipe, [*trial_run._SMALL, *trial_run._without_download(given.recipe, given.set), *given.set])
        ]
    else:
        recipes = [
            recipe for _, recipe in ablation.cases(given.recipe, given.set, None, getattr(given, "ablation", False))
        ]
    if given.command == "train-step":
        recipes += [recipe for _, recipe in ablation.variants(given)]
    for recipe in recipes:
        assert recipe.model.path == (_architecture(stage) if has_gpu else _embedded(stage))
        if given.command == "trial":
            assert recipe.reward[0].path == "random"  # type: ignore[union-attr]


def _architecture(stage: Stage) -> str:
    """The model whose architecture a stage measures on a GPU."""
    others = {"sdxl_24gb": "random-sdxl", "sd35m_24gb": "random-sd35m", "flux_24gb": "random-flux"}
    return others.get(stage.name, "random-sd15")


def _embedded(stage: Stage) -> str:
    """The model on which a stage is rehearsed."""
    return "embedded_flow" if stage.name in ("sd35m_24gb", "flux_24gb") else "embedded"


def test_both_machines_have_the_same_stages_within_ten_minutes() -> None:
    on_gpu, on_cpu = stages.stages(True), stages.stages(False)
    assert [stage.name for stage in on_gpu] == [stage.name for stage in on_cpu]
    assert len({stage.name for stage in on_gpu}) == len(on_gpu)
    assert sum(stage.share for stage in on_gpu) == 600
    files = {stage.file for stage in on_gpu} | {"kernels.md", "summary.md", "checklist.json", "logs.txt"}
    assert len(files) <= 8


@pytest.mark.parametrize("stage", stages.stages(True), ids=lambda stage: stage.name)
def test_where_rows_go_is_a_place_that_exists(stage: Stage) -> None:
    file, words = stage.place
    assert words in (ROOT / file).read_text(encoding="utf-8")


# -- train-step: rows that break ----------------------------------------------------------------------------------

FIGURES = (
    *("ms_total", "ms_sample", "ms_reward", "ms_update", "trajectories_per_hour", "gflop_per_transition"),
    *("tflop_per_second", "utilisation"),
)
QUICK = ["--recipe", str(ROOT / "recipes/tiny_cpu_db.yaml"), "--repeats", "1"]


def test_a_row_that_breaks_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This holds for every exception; and each row is on the disk before the next is measured."""
    result, breaking = tmp_path / "rows.csv", {"one pass": ValueError("no such engine"), "a=1": RunError("too small")}
    seen: list[int] = []

    def measure(label: str, recipe: Recipe, device: torch.device, repeats: int, is_predicted: bool) -> dict[str, Any]:
        seen.append(len(result.read_text().splitlines()) if result.exists() else 0)
        if label in breaking:
            raise breaking[label]
        return {"label": label, **dict.fromkeys(FIGURES, 1.0)}

    monkeypatch.setattr(commands, "measure", measure)
    options = ["--literal", "--ablation", "--variant", "memory.compile=true", "--csv", str(result), "--stage", "s"]
    assert bench.main(["train-step", *QUICK, *options]) == 0
    with result.open() as file:
        rows = list(csv.DictReader(file))
    labels = [label for label, _ in (*ablation.ABLATION, *ablation.BY_GRADIENT)]
    assert [row["label"] for row in rows] == [LITERAL, *labels, "memory.compile=true"]
    assert {row["label"]: row["error"] for row in rows if row["error"]} == {"one pass": "ValueError: no such engine"}
    assert {row["stage"] for row in rows} == {"s"}
    assert seen == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    said = capsys.readouterr()
    assert "one pass                       not measured: ValueError: no such engine" in said.out
    assert "Traceback" in said.err, "what was not foreseen is worth one"


def test_only_rows_that_broke_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*given: object, **options: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(commands, "measure", measure)
    assert bench.main(["train-step", *QUICK]) == 1


def test_a_mistyped_variant_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "measure", lambda *given: pytest.fail("measured"))
    assert bench.main(["train-step", *QUICK, "--variant", "memory.chanels_last=false"]) == 2
    assert "did you mean 'channels_last'?" in capsys.readouterr().err


# -- a reward without its download --------------------------------------------------------------------------------


def test_a_random_reward_is_the_network_without_its_weights() -> None:
    term, pictures = parse_reward("image_text", ["path=random", "max_batch=2"]), torch.rand(3, 3, 64, 64)
    reward, again = (build_reward(term, torch.device("cpu")) for _ in range(2))
    assert isinstance(reward, StandIn)
    values = checked("image_text", reward, pictures, ["a cat"] * 3)
    assert torch.equal(values, checked("image_text", again, pictures, ["a cat"] * 3))
    real = build_reward(parse_reward("image_text", []), torch.device("cpu"))
    assert not torch.allclose(values, checked("image_text", real, pictures, ["a cat"] * 3))


# -- what is missing ----------------------------------------------------------------------------------------------


def measured(folder: Path, gpu: str | None, rows: list[dict[str, str]]) -> Path:
    """Write the folder of a checklist that ran on `gpu`."""
    folder.mkdir(parents=True)
    (folder / "checklist.json").write_text(json.dumps({"machine": {"gpu": gpu}, "stages": {}}))
    with (folder / "training.csv").open("w") as file:
        writer = csv.DictWriter(file, ["stage", "label", "error"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_what_is_missing_and_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    (root / "recipes").mkdir(parents=True)
    (root / "README.md").write_text("| peak |\n| not measured |\n")
    (root / "recipes" / "a.yaml").write_text("# Time: not measured.\n")
    rows = [{"stage": "full_24gb", "label": "one pass"}, {"stage": "lora_12gb", "label": "x", "error": "too small"}]
    measured(root / missing.RESULTS / "GPU", "a GPU", rows)
    mine = measured(tmp_path / "mine", "mine", [{"stage": "paper", "label": "stored"}])
    assert missing.show(mine, root) == 0
    said = capsys.readouterr().out
    stage = {line.split()[0]: line for line in said.splitlines() if not line.startswith(" ") and line}
    assert stage["full_24gb"].endswith(f"1 of 1 rows on a GPU in {root / missing.RESULTS / 'GPU'}")
    assert stage["paper"].endswith(f"1 of 1 rows on mine in {mine}")
    assert stage["lora_12gb"].endswith("not measured"), "a row with an error measures nothing"
    assert stage["lora_24gb"].endswith("not measured")
    assert "goes to recipes/README.md at '`aesthetic_12gb.yaml`', each recipe's line `# Hardware:`" in said
    assert "2 of 13 stages are measured" in said
    assert said.endswith("  README.md:2: | not measured |\n  recipes/a.yaml:1: # Time: not measured.\n")


def test_a_cpus_checklist_measures_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = measured(tmp_path / "mine", None, [{"stage": "paper", "label": "stored"}])
    assert bench.main(["missing", str(mine)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{mine} is of a machine without a GPU: it measures nothing here\n")
    assert re.search(r"^paper +not measured$", said, re.MULTILINE)


def test_a_summary_without_rows(tmp_path: Path) -> None:
    """A folder in which no stage has started has a summary too."""
    here = Checklist(tmp_path, [stub("one")])
    assert "- one: not measured: it was not reached" in here.summary()
