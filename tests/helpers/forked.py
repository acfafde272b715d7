"""Programs in forked processes, which need not import anything again: torch, diffusers and peft take ten seconds of a CPU."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def forked(main: Callable[[Sequence[str]], int], words: Sequence[str], log: Path | int) -> int:
    """Run `main(words)` in a process that is forked from this one.

    Args:
        main: a program's `main`, which returns its exit code.
        log:  a file, or a file descriptor, that gets what the process prints.

    Returns:
        the process id.
    """
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _be(main, words, log)
    return process


def _be(main: Callable[[Sequence[str]], int], words: Sequence[str], log: Path | int) -> None:
    """Run the program and end this process; nothing of the parent's is cleaned up."""
    code = 1
    try:
        target = log if isinstance(log, int) else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(target, stream)
        # The parent's may be pytest's, which keep what is printed.
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
        code = main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(process: int) -> int:
    """Wait for a forked process; minus the signal's number if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
