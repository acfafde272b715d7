"""Programs end quietly when the reader of their output is gone, as in `python -m dag.bench missing | head`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(file for file in (ROOT / "dag").glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))


def unread(*words: str) -> tuple[int, str]:
    """Run Python with a stdout that nobody reads; returns (exit code, stderr)."""
    reader, writer = os.pipe()
    os.close(reader)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "body",
    ["print('one line')", "print('many lines\\n' * 100_000)", "print('help'); sys.exit(0)"],
    ids=["at the end", "in the middle", "before an exit"],
)
def test_output_that_nobody_reads_ends_without_a_traceback(body: str) -> None:
    program = (
        f"import sys\nfrom dag.errors import quiet_on_broken_pipe\ndef main():\n    {body}\n    return 0\n"
        "sys.exit(quiet_on_broken_pipe(main))\n"
    )
    assert unread("-c", program) == (128 + signal.SIGPIPE, "")


def test_an_exit_code_is_passed_on() -> None:
    program = "import sys; from dag.errors import quiet_on_broken_pipe; sys.exit(quiet_on_broken_pipe(lambda: 3))"
    assert unread("-c", program) == (3, "")


def test_the_bench_ends_quietly() -> None:
    assert unread("-m", "dag.bench", "missing") == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_every_program_does_so(file: Path) -> None:
    assert file.read_text(encoding="utf-8").endswith(
        'if __name__ == "__main__":\n    sys.exit(quiet_on_broken_pipe(main))\n'
    )
