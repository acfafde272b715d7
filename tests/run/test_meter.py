"""Seconds and peak memory by phase: what belongs to which phase, and what a system cannot measure."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_dag
from dag.run import meter
from dag.run.meter import PHASES, PhaseMeter

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(meter.meter_of(CPU) is None, reason="this system does not report resident peaks")


class Scripted:
    """A meter of memory that reads `now`, which a test sets."""

    def __init__(self) -> None:
        self.now, self.resets = 0, 0

    def reset(self) -> None:
        self.now, self.resets = 0, self.resets + 1

    def peak(self) -> int:
        return self.now

    def peak_held(self) -> int:
        return 2 * self.now


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    found = Scripted()
    monkeypatch.setattr(meter, "meter_of", lambda device: found)
    return found


def test_a_phase_owns_its_peak_and_time_only(scripted: Scripted) -> None:
    book = PhaseMeter(CPU)
    scripted.now = 7 << 30
    with book.phase("sample"):
        scripted.now = 3 << 30
        time.sleep(0.01)
    for peak in (1, 2):
        with book.phase("update"):
            scripted.now = peak << 30
    row = book.row()
    assert (row["memory_gib_sample"], row["memory_gib_update"], row["memory_gib_reward"]) == (3, 2, None)
    assert book.in_use == 7 << 30, "what happens between phases counts for the epoch"
    assert row["peak_memory_gib"] == 14
    assert row["seconds_sample"] >= 0.01 > row["seconds_update"]


def test_what_ran_in_the_process_before_does_not_count(scripted: Scripted) -> None:
    scripted.now = 9 << 30
    book = PhaseMeter(CPU)
    scripted.now = 1 << 30
    book.read()
    assert book.row()["peak_memory_gib"] == 2


def test_an_epoch_forgets_the_one_before_but_the_run_does_not(scripted: Scripted) -> None:
    book = PhaseMeter(CPU)
    with book.phase("sample"):
        scripted.now = 3 << 30
    book.start_epoch()
    row = book.row()
    assert row["memory_gib_sample"] is None
    assert row["seconds_sample"] == 0
    assert (row["peak_memory_gib"], book.in_use) == (6, 0)


def test_a_phase_that_fails_is_still_written_down(scripted: Scripted) -> None:
    book = PhaseMeter(CPU)

    def fail() -> None:
        with book.phase("reward"):
            scripted.now = 1 << 30
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert book.row()["memory_gib_reward"] == 1


def test_a_system_that_tells_nothing_gives_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter.ResidentMeter, "_RESET", Path("/nowhere/clear_refs"))
    book = PhaseMeter(CPU)
    with book.phase("sample"):
        pass
    row = book.row()
    assert {row[f"memory_gib_{name}"] for name in PHASES} | {row["peak_memory_gib"]} == {None}


@needs_proc
def test_resident_memory_rises_with_what_a_phase_holds_and_falls_again() -> None:
    book, size = PhaseMeter(CPU), 256 << 20
    with book.phase("sample"):
        held = torch.ones(size, dtype=torch.uint8)
    del held
    with book.phase("update"):
        pass
    assert book.peaks["sample"] - book.peaks["update"] == pytest.approx(size, rel=0.2)


@needs_proc
@pytest.mark.parametrize("rollout", ["stored", "one_pass"])
def test_a_run_writes_its_phases(tmp_path: Path, rollout: str) -> None:
    few = ("train.epochs=2", "train.trajectories=4", "sampler.steps=3", "train.micro_batch=2", "flow.passes=0")
    chosen = [*few, f"train.rollout={rollout}", "evaluation.prompts=1", "evaluation.images_per_prompt=2"]
    overrides = [word for override in chosen for word in ("--set", override)]
    recipe, run = str(ROOT / "recipes/tiny_cpu_db.yaml"), tmp_path / "run"
    assert train_dag.main(["--recipe", recipe, "--out", str(run), *overrides]) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["memory_gib_evaluation"] > 0.1
    assert rows[0]["memory_gib_update"] is None
    phases = ("reward", "update") if rollout == "one_pass" else ("sample", "reward", "update")
    for phase in phases:
        assert rows[-1][f"seconds_{phase}"] > 0, phase
    # In one pass rewards and updates alternate in every transition, so their peak is measured together.
    for phase in ("update",) if rollout == "one_pass" else phases:
        assert 0.1 < rows[-1][f"memory_gib_{phase}"] <= rows[-1]["peak_memory_gib"], phase


class Stream:
    """A clock like CUDA's events: marks cost nothing, to read the seconds between two marks waits."""

    def __init__(self) -> None:
        self.marked, self.waits = 0, 0

    def mark(self) -> int:
        self.marked += 1
        return self.marked

    def seconds(self, start: int, end: int) -> float:
        self.waits += 1
        return float(end - start)


def test_phases_are_timed_without_waiting_until_somebody_asks(scripted: Scripted) -> None:
    book, stream = PhaseMeter(CPU), Stream()
    book.clock = stream
    times, marks_of_an_update, phases = 100, 4, 2  # an update's start, the reward's start and end, the update's end
    for _ in range(times):
        with book.timed("update"), book.timed("reward"):
            pass
    assert stream.waits == 0
    assert book.row()["seconds_update"] == times * (marks_of_an_update - 1)
    assert book.seconds["reward"] == times
    assert stream.waits == times * phases


def test_moments_do_not_pile_up(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_MOST_MARKS", 10)
    book, stream = PhaseMeter(CPU), Stream()
    book.clock = stream
    for _ in range(25):
        with book.timed("update"):
            pass
        assert len(book._marks) < 10
    assert book.seconds["update"] == 25


def test_a_peak_can_be_read_without_its_time(scripted: Scripted) -> None:
    book = PhaseMeter(CPU)
    with book.peak("update"), book.timed("reward"):
        scripted.now = 5 << 30
    row = book.row()
    assert (row["memory_gib_update"], row["memory_gib_reward"], row["seconds_update"]) == (5, None, 0)
