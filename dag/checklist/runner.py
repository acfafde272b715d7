"""Measures everything that needs a GPU with one command: `python -m dag.bench checklist DIR [--minutes M]`.

Each stage (`dag.checklist.stages`) is its own process with a time limit, and appends its rows to a CSV file one by one.
However the checklist ends, DIR is readable and its summary.md says what is missing. The same command on the same DIR
continues: stages that are done are not run again.

DIR: summary.md, checklist.json (machine and how each stage ended), training.csv, run.csv, profile.csv, kernels.csv,
kernels.md, logs.txt (all that the stages printed).
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from dag_kernels import table

from dag.checklist.limited import run_limited
from dag.checklist.stages import Stage, stages
from dag.errors import RunError, UsageError
from dag.evaluation.study import ROOT
from dag.run.durable import replacing, write_json
from dag.run.locks import lock

DONE, FAILED, BEGAN, MISSING = "done", "failed", "began", "not measured"
# A stage with less time would be killed before its first row.
LEAST_SECONDS = 15.0
_STATE, _SUMMARY, _LOGS = "checklist.json", "summary.md", "logs.txt"
_ERROR = re.compile(r"(error|[\w.]*(Error|Exception|Interrupt|Iteration))(:|$)")


def add_command(commands: Any) -> None:
    """Add the arguments of `python -m dag.bench checklist`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "checklist", help="everything that wants a GPU, into a folder"
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="for all stages together; default: 10")


def run(folder: Path, minutes: float, has_gpu: bool, chosen: Sequence[Stage] | None = None) -> int:
    """Run every stage that is not done yet.

    Args:
        minutes: for all stages together.
        chosen:  the stages; None takes those of `dag.checklist.stages`.

    Returns:
        exit code: 0 if all stages are done in the end, else 1.

    Raises:
        UsageError: the folder is of another machine or another version of the code, or cannot be used.
    """
    if minutes <= 0:
        raise UsageError(f"--minutes {minutes:g}: must be above 0")
    here = Checklist(folder.resolve(), list(stages(has_gpu) if chosen is None else chosen))
    with here.held() as log, _ended_by_signals():
        here.begin(machine())
        here.run_all(60 * minutes, log)
        print((here.folder / _SUMMARY).read_text(encoding="utf-8"))
    return 0 if all(here.ended(stage) == DONE for stage in here.stages) else 1


def machine() -> dict[str, Any]:
    """What the figures depend on: GPU, versions, commit. Found by another process, so that this one uses no GPU memory."""
    command = [sys.executable, "-c", "from dag.run.machine import tell_machine; tell_machine()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        raise RunError(f"the machine cannot be described: {_last_error(done.stderr)}") from None


class Checklist:
    """A folder of figures: runs its stages, records how each ended, and writes the summary.

    Attributes:
        state: {"machine": ..., "stages": {name: {"ended", "why", "seconds"}}}, as in checklist.json.
    """

    def __init__(self, folder: Path, chosen: list[Stage]) -> None:
        self.folder, self.stages = folder, chosen
        self.state: dict[str, Any] = {"machine": {}, "stages": {}}

    @contextmanager
    def held(self) -> Iterator[IO[str]]:
        """Lock the folder against other checklists and yield the open log. Raises UsageError if it cannot be locked."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = (self.folder / _LOGS).open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot write there: {error.strerror}") from None
        with log:
            if not lock(log):
                raise UsageError(
                    f"{self.folder}: a checklist, or a stage of one that was killed, is still running there"
                )
            yield log

    def begin(self, machine: dict[str, Any]) -> None:
        """Read the state of earlier starts. Raises UsageError if it is of another machine or version."""
        file = self.folder / _STATE
        if file.exists():
            try:
                self.state = json.loads(file.read_text(encoding="utf-8"))
                before = self.state["machine"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UsageError(f"{file}: cannot be read ({error}); choose another folder") from None
            changed = [
                f"{name} {before.get(name)} then, {machine.get(name)} now"
                for name in sorted(before.keys() | machine.keys())
                if before.get(name) != machine.get(name)
            ]
            if changed:
                raise UsageError(f"{self.folder}: was measured elsewhere ({'; '.join(changed)}); choose another folder")
        self.state["machine"] = machine
        self._save()

    def run_all(self, seconds: float, log: IO[str]) -> None:
        """Run the stages that are not done; each may use its share of the time that is left for it and those after it."""
        deadline = time.monotonic() + seconds
        left = [stage for stage in self.stages if self.ended(stage) != DONE]
        for number, stage in enumerate(left):
            share = stage.share / sum(other.share for other in left[number:])
            limit = share * (deadline - time.monotonic())
            if limit < min(LEAST_SECONDS, stage.share):
                self._note(stage, MISSING, f"{limit:.0f} s were left for it; the same command goes on from here")
            else:
                self._run(stage, limit, log)

    def ended(self, stage: Stage) -> str:
        """How a stage ended: DONE, FAILED, BEGAN or MISSING."""
        return str(self.state["stages"].get(stage.name, {}).get("ended", MISSING))

    def _run(self, stage: Stage, limit: float, log: IO[str]) -> None:
        table.drop(self.folder / stage.file, "stage", stage.name)  # rows of an earlier attempt, which did not end
        self._note(stage, BEGAN, f"it began with {limit:.0f} s and did not end")
        print(f"{stage.name}: {stage.what} (at most {limit:.0f} s) ... ", end="", flush=True)
        command = [sys.executable, "-m", *(word.replace("{folder}", str(self.folder)) for word in stage.command)]
        log.write(f"==== {stage.name}: {' '.join(command)}\n")
        log.flush()
        position, start = log.tell(), time.monotonic()
        ended = run_limited(command, limit, log, ROOT)
        took = time.monotonic() - start
        if ended.code == 0:
            self._note(stage, DONE, "", took)
        else:
            why = f"over its {limit:.0f} s" if ended.code is None else self._why(ended.code, position)
            self._note(stage, FAILED, why, took)
        print(f"{self.ended(stage)}, {took:.0f} s", flush=True)

    def _why(self, code: int, position: int) -> str:
        """Why a stage failed: its signal or exit code, and its last error in the log from `position` on."""
        with (self.folder / _LOGS).open("rb") as file:
            file.seek(position)
            said = _last_error(file.read().decode(errors="replace"))
        if code < 0:
            return f"ended by {signal.Signals(-code).name}{f' after: {said}' if said else ''}"
        return said or f"exit code {code}"

    def _note(self, stage: Stage, ended: str, why: str, seconds: float | None = None) -> None:
        self.state["stages"][stage.name] = {
            "ended": ended,
            "why": why,
            "seconds": None if seconds is None else round(seconds, 1),
        }
        self._save()

    def _save(self) -> None:
        """Write state and summary to the disk."""
        write_json(self.folder / _STATE, self.state)
        with replacing(self.folder / _SUMMARY) as temporary:
            temporary.write_text(self.summary(), encoding="utf-8")

    # -- the summary ---------------------------------------------------------------------------------------------

    def rows(self, stage: Stage) -> list[dict[str, str]]:
        """The rows that a stage has written so far."""
        return [row for row in table.read(self.folder / stage.file) if row.get("stage", stage.name) == stage.name]

    def summary(self) -> str:
        """summary.md: what is done, what failed and why, what is missing, and a table of rows for each stage."""
        here = self.state["machine"]
        done = sum(self.ended(stage) == DONE for stage in self.stages)
        lines = [f"# Checklist: {here.get('gpu') or 'no GPU'}", ""]
        lines += [", ".join(f"{name} {value}" for name, value in here.items() if value is not None), ""]
        if here.get("gpu") is None:
            lines += ["There is no GPU here: the stages ran on a small model, and nothing below is about a GPU.", ""]
        lines += [f"{done} of {len(self.stages)} stages are done.", ""]
        for stage in self.stages:
            lines += [f"- {stage.name}: {self._line(stage)}", *self._notes(stage)]
        for stage in self.stages:
            if rows := self.rows(stage):
                lines += ["", f"## {stage.name}: {stage.what}", "", table.markdown(rows, stage.shown)]
        return "\n".join(lines) + "\n"

    def _notes(self, stage: Stage) -> list[str]:
        """The list that a stage writes to its file of notes, indented."""
        file = self.folder / stage.notes
        if not stage.notes or not file.is_file():
            return []
        return [f"  {line}" for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]

    def _line(self, stage: Stage) -> str:
        """How a stage ended, in one line of the summary."""
        noted, rows = self.state["stages"].get(stage.name, {}), self.rows(stage)
        errors = sum(bool(row.get("error")) for row in rows)
        count = f"{len(rows)} row{'' if len(rows) == 1 else 's'}" + (
            f", of which {errors} could not be measured" if errors else ""
        )
        ended = self.ended(stage)
        if ended == DONE:
            return f"done in {noted['seconds']:.0f} s, {count}"
        if ended == FAILED:
            return f"FAILED: {noted['why']} ({count}; {_LOGS}, after `==== {stage.name}`)"
        if ended == BEGAN:
            return f"not measured: {noted['why']} ({count}; it is still running, or was killed)"
        return f"not measured: {noted.get('why') or 'it was not reached'}"


def _last_error(text: str) -> str:
    """The last line that looks like an error message, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1][:300]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal end the present stage too, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        print(f"\nended by {signal.Signals(number).name}; the same command goes on from here", flush=True)
        raise SystemExit(128 + number)

    # Windows closes a terminal without a signal.
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gpu_of(folder: Path) -> str | None:
    """The name of the GPU that a checklist ran on; None without a GPU, or if the folder holds no checklist."""
    try:
        return json.loads((folder / _STATE).read_text(encoding="utf-8"))["machine"]["gpu"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
