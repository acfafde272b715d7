"""The folder of a run and its metrics.jsonl: what is written, what is read again, what is never overwritten."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from dag.errors import RunError, UsageError
from dag.run.durable import write_json
from dag.run.folder import RunFolder, default_path, newest_run
from dag.run.metrics import MetricsFile, finite


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def strict(line: str) -> Any:
    """Read JSON by the standard, without NaN, which Python's reader would accept."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


# -- metrics ------------------------------------------------------------------------------------------------------


def test_rows_are_appended_and_read_back(metrics: MetricsFile) -> None:
    assert metrics.read() == []
    rows: list[dict[str, Any]] = [
        {"epoch": 0, "loss": 0.1, "name": "Bär"},
        {"epoch": 1, "loss": None, "steps": [1.0, 2.5]},
    ]
    for row in rows:
        metrics.write(row)
    assert metrics.read() == rows
    assert metrics.path.read_text().count("\n") == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(metrics: MetricsFile, value: float) -> None:
    metrics.write({"epoch": 0, "loss": value, "steps": [1.0, value, [value]], "count": 3, "label": "nan"})
    assert strict(metrics.path.read_text()) == {
        "epoch": 0,
        "loss": None,
        "steps": [1.0, None, [None]],
        "count": 3,
        "label": "nan",
    }


def test_finite_leaves_the_rest_alone() -> None:
    for value in (0, -1.5, True, "inf", None, [], [1, "x"]):
        assert finite(value) == value


def test_a_resumed_run_goes_back_to_the_rows_of_its_checkpoint(metrics: MetricsFile) -> None:
    for epoch in range(3):
        metrics.write({"epoch": epoch, "loss": epoch / 3})
    kept = metrics.text()
    metrics.write({"epoch": 3})
    metrics.restore(kept)
    assert [row["epoch"] for row in metrics.read()] == [0, 1, 2]
    assert metrics.read()[2]["loss"] == 2 / 3
    metrics.write({"epoch": 3})
    assert [row["epoch"] for row in metrics.read()] == [0, 1, 2, 3]
    assert list(metrics.path.parent.iterdir()) == [metrics.path], "no temporary file stays"


def test_rows_come_back_where_the_file_is_gone(metrics: MetricsFile) -> None:
    metrics.write({"epoch": 0})
    kept = metrics.text()
    metrics.path.unlink()
    metrics.restore(kept)
    assert metrics.read() == [{"epoch": 0}]
    metrics.restore("")
    assert metrics.read() == []


def test_a_row_cut_short_by_a_crash_does_not_block_the_run(metrics: MetricsFile) -> None:
    metrics.write({"epoch": 0})
    with metrics.path.open("a") as file:
        file.write('{"epoch": 1, "lo')
    assert [row["epoch"] for row in metrics.read()] == [0]
    metrics.restore(metrics.text())
    metrics.write({"epoch": 1})
    assert [strict(line)["epoch"] for line in metrics.path.read_text().splitlines()] == [0, 1]


# -- creating -----------------------------------------------------------------------------------------------------


def test_a_new_run_folder(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "deep" / "run")
    assert run.path.is_dir()
    assert run.metrics.path == run.path / "metrics.jsonl"
    assert not [path for path in run.path.rglob("*") if path.is_file()], "the probe of writability is gone"


def test_a_folder_without_files_may_become_a_run(tmp_path: Path) -> None:
    """A run that is refused before it begins must leave a folder that the next start can use."""
    for _ in range(2):
        assert RunFolder.create(tmp_path).path == tmp_path


def test_pictures_can_be_saved_once_the_run_is_described(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_description({"seed": 0})
    assert run.samples.is_dir()


@pytest.mark.parametrize("content", ["run.json", ".hidden", "samples/mine.png"])
def test_a_folder_that_holds_a_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("mine")
    with pytest.raises(UsageError, match="the folder is not empty; continue that run with --resume"):
        RunFolder.create(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / content]
    assert (tmp_path / content).read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=f"^--out {re.escape(str(path))}: cannot write there: "):
            RunFolder.create(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("failing", ["mkdir", "touch"])
def test_a_disk_that_refuses_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, failing, refuse)
    with pytest.raises(UsageError, match="cannot write there: Read-only file system"):
        RunFolder.create(tmp_path / "run")


def test_a_folder_that_cannot_be_listed_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("iterdir", "rglob", "glob"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        RunFolder.create(tmp_path)


# -- opening ------------------------------------------------------------------------------------------------------


def test_opening_needs_a_description(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run there \(run.json is missing\)"):
        RunFolder.open(tmp_path)
    write_json(tmp_path / "run.json", {"seed": 3})
    assert RunFolder.open(tmp_path).read_description() == {"seed": 3}


@pytest.mark.parametrize("content", [b"{", b"", b"\xff"])
def test_a_broken_description_is_a_run_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: cannot be read: "):
        RunFolder.open(tmp_path).read_description()


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"seed": 1})
    for bad in ({"loss": math.nan}, {"path": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert strict(path.read_text()) == {"seed": 1}
    assert list(tmp_path.iterdir()) == [path]


# -- finding ------------------------------------------------------------------------------------------------------


def run_with_checkpoint(name: str) -> Path:
    path = Path("runs") / name
    (path / "checkpoints/epoch_0001").mkdir(parents=True)
    return path


def test_the_default_folder_carries_recipe_and_time() -> None:
    path = default_path("tiny_cpu")
    assert path.parent == Path("runs")
    assert re.fullmatch(r"tiny_cpu-\d{8}-\d{6}", path.name)


def test_the_newest_run_is_the_last_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_with_checkpoint("tiny-20240102-000000")
    newest = run_with_checkpoint("tiny-20240102-000001")
    run_with_checkpoint("tiny-20231231-235959")
    (Path("runs") / "tiny-20240103-000000" / "samples").mkdir(parents=True)
    assert newest_run("tiny") == newest


def test_the_newest_run_is_of_this_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a recipe may be the beginning of another's name."""
    monkeypatch.chdir(tmp_path)
    mine = run_with_checkpoint("tiny-20240101-000000")
    run_with_checkpoint("tiny-long-20240102-000000")
    run_with_checkpoint("tinier-20240102-000000")
    bracketed = run_with_checkpoint("tiny[1]-20240101-000000")
    assert newest_run("tiny") == mine
    assert newest_run("tiny[1]") == bracketed


def test_a_run_whose_last_checkpoint_is_gone_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (run_with_checkpoint("tiny-20240101-000000") / "checkpoints/epoch_0001").rmdir()
    with pytest.raises(UsageError, match="no run of tiny with a checkpoint under runs/; name its folder: --resume DIR"):
        newest_run("tiny")


def test_no_runs_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run of tiny"):
        newest_run("tiny")


def test_metrics_of_an_earlier_version_are_read_under_todays_names(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"epoch": 1, "fidelity_top1": 0.5, "fidelity_top5": 1.0})
    assert metrics.read() == [{"epoch": 1, "noun_top1": 0.5, "noun_top5": 1.0}]
