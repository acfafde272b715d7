"""The kernels' benchmark without a GPU: its rows, a row that fails, and the CSV file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dag_kernels import bench, table, timing
from dag_kernels.specs import OPS

CPU = torch.device("cpu")


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Replaces the measurements that need a GPU; holds the calls that were timed, each of which has run once."""
    pytest.importorskip("triton")
    timed: list[Callable[[], object]] = []

    def quantiles(call: Callable[[], object]) -> tuple[float, float, float]:
        call()
        timed.append(call)
        return 0.9, 1.0, 1.2

    monkeypatch.setattr(timing, "_quantiles", quantiles)
    monkeypatch.setattr(timing, "_peak_mib", lambda call: 1.0)
    monkeypatch.setattr(timing, "_launches", lambda call: 1)
    monkeypatch.setattr(torch, "compile", lambda op, **options: op)
    return timed


SMALL = ((2, (2, 4, 4), True), (3, (2, 4, 4), False))


def rows_of(name: str, *chosen: Any) -> list[timing.Row]:
    return list(timing.rows_of(replace(OPS[name], cases=SMALL), CPU, 100.0, *chosen))


def test_about_sixty_rows() -> None:
    """Few enough rows for a few minutes: one dtype, and the compiled reference at two shapes of an operation only."""
    count = 0
    for spec in OPS.values():
        modes = 2 if spec.gradients else 1
        count += sum(modes * (3 if compiled else 2) for _, _, compiled in spec.cases)
        assert sum(compiled for _, _, compiled in spec.cases) == 2
    assert count == 56


@pytest.mark.parametrize("name", OPS)
def test_every_row_of_an_operation(name: str, stopwatch: list[Any]) -> None:
    rows, modes = rows_of(name), ["forward", "both"] if OPS[name].gradients else ["forward"]
    expected = [(B, provider, mode) for B, providers in ((2, timing.PROVIDERS), (3, ("eager", "fused")))
                for provider in providers for mode in modes]  # fmt: skip
    assert [(row["B"], row["provider"], row["mode"]) for row in rows] == expected
    assert {row["provider"] for row in rows_of(name, ("compiled",))} == {"compiled"}
    assert [row for row in rows if "error" in row] == []
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert len(stopwatch) == len(rows) + len(modes)
    for row in rows:
        assert timing.shown(row)


def test_what_is_wrong_is_not_timed_and_is_a_row(stopwatch: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: object) -> None:
        raise AssertionError("x_next: error 1 at element 3")

    monkeypatch.setattr(timing, "check", wrong)
    rows = rows_of("transition_log_probs")
    fused = [row for row in rows if row["provider"] == "fused"]
    assert {row["error"] for row in fused} == {"wrong, hence not timed: x_next: error 1 at element 3"}
    assert not any("us_p50" in row for row in fused)
    others = [row for row in rows if row["provider"] != "fused"]
    assert all("us_p50" in row for row in others)
    assert len(stopwatch) == len(others)


def test_a_row_that_breaks_does_not_end_the_others(stopwatch: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = timing._quantiles, iter(range(100))

    def breaks_once(call: Callable[[], object]) -> tuple[float, float, float]:
        if next(count) == 1:
            raise torch.OutOfMemoryError("out of memory\nwith a second line")
        return original(call)

    monkeypatch.setattr(timing, "_quantiles", breaks_once)
    rows = rows_of("sampling_step")
    assert [row.get("error") for row in rows] == [None, "OutOfMemoryError: out of memory", None, None, None]
    assert "not measured" in timing.shown(rows[1])


def test_every_compiled_row_is_compiled(stopwatch: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch compiles a function for a limited number of shapes, then silently runs it eagerly; here are more shapes."""
    monkeypatch.undo()
    for name, stub in (("_peak_mib", lambda call: 1.0), ("_launches", lambda call: 1)):
        monkeypatch.setattr(timing, name, stub)
    shapes = tuple((2, (1, 1, side), True) for side in range(2, 14))
    compiled, compile_with = [0], torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        compiled[0] += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda op, **options: compile_with(op, backend=backend, **options))
    by_row: list[int] = []

    def quantiles(call: Callable[[], object]) -> tuple[float, float, float]:
        before = compiled[0]
        call()
        by_row.append(compiled[0] - before)
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(timing, "_quantiles", quantiles)
    spec = replace(OPS["transition_log_probs"], cases=shapes)
    rows = list(timing.rows_of(spec, CPU, 100.0, ("compiled",)))
    assert [row for row in rows if "error" in row] == []
    assert len(by_row) == 2 * len(shapes)
    assert min(by_row) > 0


# -- the checklist of the kernels ---------------------------------------------------------------------------------


def test_the_checklist_tells_how_each_part_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(out: Path, device: torch.device) -> tuple[bool, str]:
        assert "registers and spills: not measured: it was not reached" in (out / "kernels.md").read_text()
        raise OSError("no such program")

    monkeypatch.setattr(bench, "_tests", breaks)
    monkeypatch.setattr(bench, "_registers", lambda out, device: (True, "none spills"))
    assert bench.checklist(tmp_path / "out", CPU) == 1
    said = (tmp_path / "out" / "kernels.md").read_text()
    assert "- times: not measured: there is no GPU" in said
    assert "- tests: FAILED: OSError: no such program" in said
    assert "- registers and spills: none spills" in said
    last = capsys.readouterr().out.splitlines()[-1]
    assert "README" in last
    assert "dag" not in last.replace("dag_kernels", "")


def test_the_checklist_appends_its_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def rows(names: object, device: object, providers: tuple[str, ...]) -> Any:
        for number in range(3):
            yield {"op": "x", "provider": providers[0], "us_p50": number}
            written.append(len(table.read(tmp_path / "kernels.csv")))

    monkeypatch.setattr(bench, "rows", rows)
    for part in (bench._times, bench._compiled_times):
        assert part(tmp_path, torch.device("cuda")) == (True, "3 rows in kernels.csv")
    assert written == [1, 2, 3, 4, 5, 6]
    assert [row["provider"] for row in table.read(tmp_path / "kernels.csv")] == ["eager"] * 3 + ["compiled"] * 3


def test_the_checklists_tests_see_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def run(command: object, *, env: dict[str, str], **options: object) -> SimpleNamespace:
        shown.append(env["DAG_TEST_DEVICE"])
        return SimpleNamespace(returncode=0, stdout="== 130 passed in 50 s ==", stderr="")

    monkeypatch.setattr("subprocess.run", run)
    assert bench._tests(tmp_path, torch.device("cuda")) == (True, "passed on the GPU: 130 passed in 50 s")
    bench._tests(tmp_path, CPU)
    assert shown == ["cuda", "cpu"]


def test_without_pytest_the_checklist_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench._tests(tmp_path, CPU) == (True, "not run: pytest is not installed")
    assert bench._registers(tmp_path, CPU) == (True, "not counted: triton is not installed")


# -- the file -----------------------------------------------------------------------------------------------------


def test_rows_with_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    table.append(path, {"a": 1, "b": "x, y"})
    table.append(path, {"a": 2, "error": "two\nlines", "list": [1, 2]})
    table.append(path, {"b": None, "a": 3})
    assert path.read_text().count("\n") == 4
    assert table.read(path) == [
        {"a": "1", "b": "x, y", "error": "", "list": ""},
        {"a": "2", "b": "", "error": "two lines", "list": "[1, 2]"},
        {"a": "3", "b": "", "error": "", "list": ""},
    ]
    assert [inside.name for inside in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("cut", [1, 3, 5, 8])
def test_a_row_cut_short_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.csv"
    table.append(path, {"a": "first", "b": "1"})
    table.append(path, {"a": "second", "b": "2"})
    path.write_text(path.read_text()[:-cut])
    assert [row["a"] for row in table.read(path)] == ["first"]
    table.append(path, {"a": "third", "b": "3"})
    assert [row["a"] for row in table.read(path)] == ["first", "third"]


def test_rows_of_one_value_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for name, value in (("one", 1), ("two", 2), ("one", 3)):
        table.append(path, {"stage": name, "value": value})
    table.drop(path, "stage", "one")
    assert table.read(path) == [{"stage": "two", "value": "2"}]
    table.drop(tmp_path / "none.csv", "stage", "one")
    assert table.read(tmp_path / "none.csv") == []


def test_a_table_shows_the_columns_that_have_values() -> None:
    shown = table.markdown([{"a": "1", "b": "", "c": "x|y"}, {"a": "2", "b": ""}], ("a", "b", "c", "d"))
    assert shown.splitlines() == ["| a | c |", "| --- | --- |", "| 1 | x/y |", "| 2 |  |"]


def test_a_markdown_table_shows_zeros_and_leaves_empty_columns_out() -> None:
    rows: list[dict[str, Any]] = [{"a": 0, "b": None, "c": ""}, {"a": "x|y"}]
    assert table.markdown(rows, ("a", "b", "c")) == "| a |\n| --- |\n| 0 |\n| x/y |"
