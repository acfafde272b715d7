"""Everything that wants a GPU, in one go: `python -m dag.bench checklist DIR [--minutes M]`.

Each stage (`dag.checklist.stages`) is a process of its own with a time limit, and appends its rows to a CSV file as it has them.
Whatever ends the checklist, DIR is readable and its summary.md says what is missing. The same command on the same DIR
goes on: stages that are done are not run again.

DIR: summary.md, checklist.json (machine and how each stage ended), training.csv, run.csv, profile.csv, kernels.csv,
kernels.md, logs.txt (all that the stages printed).
"""

import argparse
import fcntl
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

DONE, FAILED, BEGAN, MISSING = "done", "failed", "began", "not measured"
# With less than this a stage would be killed before its first row.
LEAST_SECONDS = 15.0
_STATE, _SUMMARY, _LOGS = "checklist.json", "summary.md", "logs.txt"
_ERROR = re.compile(r"(error|[\w.]*(Error|Exception|Interrupt|Iteration))(:|$)")


def add_command(commands: Any) -> None:
    """The command line of `python -m dag.bench checklist`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "checklist", help="everything that wants a GPU, into a folder"
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="for all stages together; default: 10")


def run(folder: Path, minutes: float, has_gpu: bool, chosen: Sequence[Stage] | None = None) -> int:
    """Every stage that is not done yet; 0 if all are in the end.

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
    """What the figures depend on. In a process of its own, which leaves nothing on the GPU."""
    command = [sys.executable, "-c", "from dag.costs.commands import tell_machine; tell_machine()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        raise RunError(f"the machine cannot be described: {_last_error(done.stderr)}") from None


class Checklist:
    """A folder of figures: which stages are done, and what is told about them.

    Attributes:
        state: {"machine": ..., "stages": {name: {"ended", "why", "seconds"}}}, as in checklist.json.
    """

    def __init__(self, folder: Path, chosen: list[Stage]) -> None:
        self.folder, self.stages = folder, chosen
        self.state: dict[str, Any] = {"machine": {}, "stages": {}}

    @contextmanager
    def held(self) -> Iterator[IO[str]]:
        """The log; nobody else writes in this folder inside."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = (self.folder / _LOGS).open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot write there: {error.strerror}") from None
        with log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.folder}: a checklist, or a stage of one that was killed, is still running there"
                ) from None
            yield log

    def begin(self, machine: dict[str, Any]) -> None:
        """Read what is there already. Raises UsageError if that is of another machine or version."""
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
        self._tell()

    def run_all(self, seconds: float, log: IO[str]) -> None:
        """Each stage gets its share of the time that is left to it and those after it."""
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
        return str(self.state["stages"].get(stage.name, {}).get("ended", MISSING))

    def _run(self, stage: Stage, limit: float, log: IO[str]) -> None:
        table.drop(self.folder / stage.file, "stage", stage.name)  # of an attempt that did not end
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
        self._tell()

    def _tell(self) -> None:
        """State and summary on the disk."""
        write_json(self.folder / _STATE, self.state)
        with replacing(self.folder / _SUMMARY) as temporary:
            temporary.write_text(self.summary(), encoding="utf-8")

    # -- what is told --------------------------------------------------------------------------------------------

    def rows(self, stage: Stage) -> list[dict[str, str]]:
        """A stage's rows so far."""
        return [row for row in table.read(self.folder / stage.file) if row.get("stage", stage.name) == stage.name]

    def summary(self) -> str:
        """What is done with its rows, what failed and why, what is missing."""
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
        """The list that a stage leaves beside its rows."""
        file = self.folder / stage.notes
        if not stage.notes or not file.is_file():
            return []
        return [f"  {line}" for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]

    def _line(self, stage: Stage) -> str:
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
    """The last line that tells an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [""])[-1][:300]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the stage under way too, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        print(f"\nended by {signal.Signals(number).name}; the same command goes on from here", flush=True)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def gpu_of(folder: Path) -> str | None:
    """The GPU that a checklist's folder is of; None if it has none, or is no such folder."""
    try:
        return json.loads((folder / _STATE).read_text(encoding="utf-8"))["machine"]["gpu"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
