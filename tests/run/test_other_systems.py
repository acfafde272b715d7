"""What Windows and macOS do not have is not needed there. Both are made up here; nothing ran on them."""

import ast
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dag import errors
from dag.checklist import limited, runner
from dag.recipe import shipped
from dag.recipe.load import load
from dag.run import durable, locks, machine
from dag.run.meter import ResidentMeter, meter_of

ROOT = Path(__file__).parents[2]
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog"}
POSIX_NAMES = {f"signal.SIG{name}" for name in ("HUP", "KILL", "PIPE", "USR1", "USR2", "CHLD", "ALRM", "QUIT")}
POSIX_NAMES |= {f"os.{name}" for name in ("fork", "getuid", "setsid", "killpg", "uname", "sched_getaffinity")}


def unguarded(source: str) -> list[str]:
    """What a module takes from POSIX systems when it is imported, without asking which system it is on."""
    return [name for node in ast.parse(source).body for name in _taken(node)]


def _taken(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(node, ast.If | ast.IfExp) and "sys.platform" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from ({alias.name for alias in node.names} & POSIX_MODULES)
    if isinstance(node, ast.ImportFrom) and node.module in POSIX_MODULES:
        yield node.module
    if isinstance(node, ast.Attribute) and ast.unparse(node) in POSIX_NAMES:
        yield ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from _taken(child)


def test_importing_takes_nothing_that_windows_does_not_have() -> None:
    files = [*(ROOT / "dag").rglob("*.py"), *(ROOT / "kernels/dag_kernels").rglob("*.py"), ROOT / "train_dag.py"]
    taken = {str(file.relative_to(ROOT)): unguarded(file.read_text(encoding="utf-8")) for file in files}
    assert {file: names for file, names in taken.items() if names} == {}
    guarded = (
        "import sys\nif sys.platform == 'win32':\n    import msvcrt\nelse:\n    import fcntl\ndef f(): os.fork()\n"
    )
    assert unguarded(guarded) == []
    bare = "import fcntl, os\nfrom resource import x\nclass A:\n    NUMBER = 128 + signal.SIGPIPE\n"
    assert unguarded(bare) == ["fcntl", "resource", "signal.SIGPIPE"]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`dag.run.locks` as Windows imports it, with a made-up msvcrt that keeps one lock for each file."""
    held: dict[int, int] = {}

    def locking(descriptor: int, mode: int, count: int) -> None:
        file, offset = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        assert count == 1 and offset >= 2**30, "a byte that nobody reads"
        if mode == 0:
            assert held.pop(file) == descriptor
        elif file in held:
            raise PermissionError(13, "Permission denied")
        else:
            held[file] = descriptor

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert locks.__spec__ is not None
    module = importlib.util.module_from_spec(locks.__spec__)
    assert locks.__spec__.loader is not None
    locks.__spec__.loader.exec_module(module)
    return module


@pytest.mark.parametrize("system", ["this", "windows"])
def test_a_file_is_locked_on_both_systems(tmp_path: Path, request: pytest.FixtureRequest, system: str) -> None:
    module = locks if system == "this" else request.getfixturevalue("windows")
    path = tmp_path / "lock"
    with path.open("w") as first, path.open() as second, path.open("a") as third:
        assert not module.is_locked(second)
        assert module.lock(first)
        assert module.is_locked(second) and not module.lock(third)
        module.unlock(first)
        assert not module.is_locked(second)
        assert path.read_text() == ""


def test_windows_cannot_open_folders_and_flushes_what_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, flags_of = os.open, []

    def opened(path: Path, flags: int) -> int:
        assert not Path(path).is_dir()
        flags_of.append(flags)
        return original(path, flags)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", opened)
    durable.write_json(tmp_path / "a.json", {"a": 1})
    assert flags_of == [os.O_RDWR] and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_signals_that_are_not_there_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGPIPE", "SIGHUP", "SIGKILL", "SIGUSR1"):
        monkeypatch.delattr(signal, name)
    before = signal.getsignal(signal.SIGTERM)
    with runner._ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    original = os.dup(1)
    out = SimpleNamespace(fileno=lambda: original, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", out)

    def gone() -> int:
        raise BrokenPipeError

    assert errors.quiet_on_broken_pipe(gone) == 128 + 13
    os.close(original)


def test_a_command_is_ended_without_process_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(limited, "_LIBC", None)
    monkeypatch.delattr(os, "killpg")
    with (tmp_path / "log").open("w") as log:
        assert limited.run_limited(["sleep", "60"], 0.1, log, tmp_path).code is None


def test_without_proc_there_is_no_meter_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(ResidentMeter, "_RESET", tmp_path / "proc/clear_refs")
    assert meter_of(torch.device("cpu")) is None


# -- an installed copy --------------------------------------------------------------------------------------------


def test_an_installed_copy_finds_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip lays them out; `[tool.setuptools.data-files]` in pyproject.toml names the folder."""
    share = tmp_path / "venv/share/dag-align"
    share.mkdir(parents=True)
    (share / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(shipped, "_CHECKOUT", tmp_path / "venv/lib/recipes")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "venv"))
    monkeypatch.chdir(tmp_path)
    assert not shipped.is_checkout()
    assert load("recipes/tiny_cpu.yaml") == load(ROOT / "recipes/tiny_cpu.yaml")
    (tmp_path / "recipes").mkdir()
    own = (ROOT / "recipes/tiny_cpu.yaml").read_text().replace("epochs: 5", "epochs: 6")
    (tmp_path / "recipes/tiny_cpu.yaml").write_text(own)
    assert load("recipes/tiny_cpu.yaml").train.epochs == 6, "a file that is there comes first"


def test_pip_installs_every_recipe_and_every_file_that_is_read() -> None:
    import tomllib

    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {
        path for patterns in tools["data-files"].values() for pattern in patterns for path in ROOT.glob(pattern)
    }
    wanted = {path for path in (ROOT / "recipes").rglob("*.yaml") if "results" not in path.parts}
    assert wanted | {ROOT / "recipes" / shipped.SCHEMA} == installed
    for folder, patterns in tools["data-files"].items():
        assert {path.parent.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)} == {
            folder.removeprefix("share/dag-align/")
        }


def test_the_commit_is_that_of_this_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed copy may lie in somebody else's repository."""
    answers = {"rev-parse": str(tmp_path), "describe": "abc"}
    monkeypatch.setattr(machine, "_git", lambda *words: answers[words[0]])
    assert machine.git_commit() is None
    answers["rev-parse"] = str(ROOT)
    assert machine.git_commit() == "abc"
