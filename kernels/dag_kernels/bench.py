"""Time the fused operations on a GPU against plain PyTorch, eager and compiled.

    python -m dag_kernels.bench [--op OP] [--check] [--csv FILE] [--plot DIR]
    python -m dag_kernels.bench --checklist DIR

A row (`dag_kernels.timing`) has the median and the 20/80 quantiles of the time, the GB/s of one fused pass and their share of
this GPU's measured copy bandwidth, peak MiB beyond the inputs, and kernel launches. An operation with wrong results is not
timed; `--check` only checks the results.

`--checklist` does everything that these kernels need a GPU for: it writes their times to DIR/kernels.csv, runs their tests, and
lists the registers that each kernel needs; DIR/kernels.md says how each part ended. Without a GPU it does what can be done
without one and says what was not measured.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dag_kernels import choose, table
from dag_kernels.specs import OPS
from dag_kernels.timing import PROVIDERS, Row, bandwidth, rows_of, shown
from dag_kernels.verify import check

TESTS = Path(__file__).parents[2] / "tests" / "kernels" / "test_kernels.py"
# Time limit in seconds, for the tests and for the registers each.
_LIMIT = 300


def rows(names: Sequence[str], device: torch.device, providers: Sequence[str] = PROVIDERS) -> Iterator[Row]:
    """Yield and print all rows of these operations with these providers."""
    copy, here = bandwidth(device), environment(device)
    print(f"copy bandwidth {copy:.0f} GB/s", flush=True)
    for name in names:
        for row in rows_of(OPS[name], device, copy, providers):
            print(shown(row), flush=True)
            yield {**row, "copy_gb_s": round(copy, 1), **here}


def check_all(names: Sequence[str], device: torch.device) -> None:
    """Check the fused operations against the reference in three dtypes. Raises AssertionError if one is wrong."""
    for name in names:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check(OPS[name], OPS[name].make(4, (4, 32, 32), dtype, device, 0), choose("triton", device))
        print(f"{name}: right")


def environment(device: torch.device) -> Row:
    """What measured figures depend on: machine, versions, GPU, commit."""
    described: Row = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    try:
        described["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        described["triton"] = None
    described["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    described["commit"] = _commit()
    return described


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Draw time against batch size for each operation, at SD 1.x latents in bfloat16, one PNG each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if "error" not in row]
    for name in sorted({row["op"] for row in rows}):
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for provider, (mode, style) in itertools.product(PROVIDERS, (("forward", "-"), ("both", "--"))):
            wanted = (name, provider, mode, "bfloat16", "4x64x64")
            chosen = [r for r in rows if (r["op"], r["provider"], r["mode"], r["dtype"], r["shape"]) == wanted]
            if chosen:
                x, y = [row["B"] for row in chosen], [row["us_p50"] for row in chosen]
                axes.plot(x, y, style, marker="o", label=f"{provider}, {mode}")
        axes.set(xscale="log", yscale="log", xlabel="samples of 4x64x64, bfloat16", ylabel="microseconds", title=name)
        axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=120)
        pyplot.close(figure)


# -- the checklist ------------------------------------------------------------------------------------------------


def checklist(out: Path, device: torch.device) -> int:
    """Run all parts of the checklist, those that only a GPU can do first. Returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.csv").unlink(missing_ok=True)
    parts = {"times": _times, "tests": _tests, "compiled times": _compiled_times, "registers and spills": _registers}
    results, failed = dict.fromkeys(parts, "not measured: it was not reached"), []
    for name, part in parts.items():
        _write(out / "kernels.md", device, results)
        try:
            is_good, results[name] = part(out, device)
        except Exception as error:
            is_good, results[name] = False, f"FAILED: {type(error).__name__}: {error}"
        print(f"{name}: {results[name]}", flush=True)
        if not is_good:
            failed.append(f"{name}: {results[name]}")
    _write(out / "kernels.md", device, results)
    for text in failed:
        print(f"error: {text}", file=sys.stderr, flush=True)
    print("These are the kernels alone: the project's README names the command for everything that wants a GPU.")
    return 1 if failed else 0


def _write(path: Path, device: torch.device, results: dict[str, str]) -> None:
    """Write how each part ended to a Markdown file."""
    here = ", ".join(f"{name} {value}" for name, value in environment(device).items() if value)
    lines = [f"- {name}: {text}" for name, text in results.items()]
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("\n".join([f"# Kernels: {here}\n", *lines]) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _times(out: Path, device: torch.device) -> tuple[bool, str]:
    return _appended(out, device, ("eager", "fused"))


def _compiled_times(out: Path, device: torch.device) -> tuple[bool, str]:
    """Times of the compiled reference. A part of its own, since compiling takes most of the checklist's time."""
    return _appended(out, device, ("compiled",))


def _appended(out: Path, device: torch.device, providers: Sequence[str]) -> tuple[bool, str]:
    if device.type != "cuda":
        return True, "not measured: there is no GPU"
    count = wrong = 0
    for row in rows(list(OPS), device, providers):
        table.append(out / "kernels.csv", row)
        count, wrong = count + 1, wrong + ("error" in row)
    return not wrong, f"{count} rows in kernels.csv" + (f", of which {wrong} have an error" if wrong else "")


def _tests(out: Path, device: torch.device) -> tuple[bool, str]:
    if not TESTS.is_file():
        return True, f"not run: there is no {TESTS.parent.name}/{TESTS.name} beside this package"
    if importlib.util.find_spec("pytest") is None:
        return True, "not run: pytest is not installed"
    where = "on the GPU" if device.type == "cuda" else "through the interpreter"
    command = [sys.executable, "-m", "pytest", str(TESTS)]
    environment = {**os.environ, "DAG_TEST_DEVICE": device.type}  # without it the tests see no GPU
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[1], timeout=_LIMIT
    )
    print(done.stdout + done.stderr, flush=True)
    last = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2].strip("= ")
    return done.returncode == 0, f"{'passed' if done.returncode == 0 else 'FAILED'} {where}: {last}"


def _registers(out: Path, device: torch.device) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return True, "not counted: triton is not installed"
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dag_kernels.resources"]
    done = subprocess.run(command, capture_output=True, text=True, env=without, timeout=_LIMIT)
    if done.returncode != 0:
        return False, f"FAILED: {done.stderr.strip().rpartition(chr(10))[2]}"
    compiled = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    return True, f"{len(compiled)} kernels compiled:\n\n{done.stdout}"


# -- commands -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dag_kernels.bench", description="Time the fused operations.")
    parser.add_argument("--op", choices=list(OPS), action="append", help="only this one; may be repeated")
    parser.add_argument("--check", action="store_true", help="check and do not time")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows there as they come")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the times there")
    parser.add_argument("--checklist", type=Path, metavar="DIR", help="times, tests and registers, into DIR")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.checklist is not None:
        return checklist(given.checklist, device)
    if device.type != "cuda" and not (given.check and os.environ.get("TRITON_INTERPRET") == "1"):
        print("there is no GPU: nothing to time (TRITON_INTERPRET=1 ... --check runs on a CPU)", file=sys.stderr)
        return 1
    names, found = given.op or list(OPS), []
    if given.check:
        try:
            check_all(names, device)
        except AssertionError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return 1
        return 0
    for row in rows(names, device):
        found.append(row)
        if given.csv is not None:
            table.append(given.csv, row)
    if given.plot is not None:
        plot(found, given.plot)
    return 1 if any("error" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
