"""Time the fused operations on a GPU against plain PyTorch, eager and compiled.

    python -m dag_kernels.bench [--op OP] [--check] [--csv FILE] [--plot DIR]
    python -m dag_kernels.bench --checklist DIR

Each operation is checked (`dag_kernels.verify`) on the very inputs it is about to be timed on; what is wrong is not
timed. `--check` stops there. A row: median and 20/80 quantiles of the time, GB/s of the bytes that one fused pass would
move and their share of this GPU's measured copy bandwidth, peak MiB beyond the inputs, kernel launches.

`--checklist` does everything in the repository that wants a GPU, in one go and within ten minutes, and leaves JSON, CSV,
plots and a summary in DIR. Without a GPU it does what can be done without one and says what was not measured.
"""

import argparse
import csv
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dag_kernels import choose
from dag_kernels.specs import OPS, Inputs, OpSpec
from dag_kernels.verify import check

Row = dict[str, Any]

LATENT, SDXL, WIDE = (4, 64, 64), (4, 128, 128), (16, 64, 64)
# A micro-batch of SD 1.x latents, of SDXL's and of 16-channel ones; a rollout of 64 samples and 50 steps at once.
CASES = (*((B, LATENT) for B in (1, 2, 4, 8, 16, 32)), (4, SDXL), (16, SDXL), (4, WIDE), (16, WIDE), (3200, LATENT))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROVIDERS = ("eager", "compiled", "fused")


def bandwidth(device: torch.device) -> float:
    """GB/s of copying 1 GiB on the device, read and write counted."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _quantiles(lambda: target.copy_(source))[1] / 1e6


def rows_of(spec: OpSpec, device: torch.device, copy_gb_s: float) -> Iterator[Row]:
    """Every case of an operation. Raises AssertionError before the timing of a case that is wrong."""
    fused = choose("triton", device)
    modes = ("forward", "both") if spec.gradients else ("forward",)
    for dtype, (B, shape) in itertools.product(DTYPES, CASES):
        inputs = spec.make(B, shape, dtype, device, 0)
        check(spec, _at_most(inputs, 64), fused)
        for provider, mode in itertools.product(PROVIDERS, modes):
            op = _provider(spec, provider, getattr(fused, spec.name))
            yield _row(spec, op, provider, mode, B, shape, dtype, inputs, copy_gb_s)


def _at_most(inputs: Inputs, rows: int) -> Inputs:
    """The first rows of a large case: float64 copies of all of it need not fit."""
    B = len(inputs.get("k", ())) if isinstance(inputs.get("k"), torch.Tensor) else len(inputs.get("sample_id", ()))
    if rows >= B:
        return inputs
    cut = {n: v[:rows] if isinstance(v, torch.Tensor) and len(v) == B else v for n, v in inputs.items()}
    return cut | {"output": torch.cat([inputs["output"][:rows], inputs["output"][B : B + rows]])}


def _provider(spec: OpSpec, provider: str, fused: Callable[..., Any]) -> Callable[..., Any]:
    if provider == "fused":
        return fused
    return torch.compile(spec.reference(), dynamic=False) if provider == "compiled" else spec.reference()


def _row(
    spec: OpSpec,
    op: Callable[..., Any],
    provider: str,
    mode: str,
    B: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Inputs,
    copy_gb_s: float,
) -> Row:
    call = _call(spec, op, inputs, mode == "both")
    low, middle, high = _quantiles(call)
    forward, backward = spec.bytes_moved(B, shape, dtype)
    gb_s = (forward + (backward if mode == "both" else 0)) / middle / 1e6
    return {
        "op": spec.name,
        "provider": provider,
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "B": B,
        "shape": "x".join(map(str, shape)),
        "us_p20": round(1e3 * low, 2),
        "us_p50": round(1e3 * middle, 2),
        "us_p80": round(1e3 * high, 2),
        "gb_s": round(gb_s, 1),
        "percent_of_copy": round(100 * gb_s / copy_gb_s, 1),
        "peak_mib": round(_peak_mib(call), 2),
        "launches": _launches(call),
    }


def _call(spec: OpSpec, op: Callable[..., Any], inputs: Inputs, with_backward: bool) -> Callable[[], object]:
    """The operation alone, or with all its gradients from ones."""
    inputs = dict(inputs)
    if not with_backward:
        return lambda: op(**inputs)
    leaves = []
    for name in spec.gradients:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
        leaves.append(inputs[name])

    def both() -> object:
        outputs = [value for value in op(**inputs) if value is not None and value.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(value) for value in outputs])

    return both


def _quantiles(call: Callable[[], object]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles in milliseconds, caches flushed between calls."""
    from triton.testing import do_bench

    low, middle, high = do_bench(call, quantiles=[0.2, 0.5, 0.8])
    return low, middle, high


def _peak_mib(call: Callable[[], object]) -> float:
    """Allocated by one call beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


# -- output -------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> Row:
    """What a figure depends on."""
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


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Time against batch for each operation, at SD 1.x latents in bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
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


def shown(row: Row) -> str:
    return (
        f"{row['op']:22} {row['provider']:9} {row['mode']:8} {row['dtype']:9} {row['B']:5} x {row['shape']:9} "
        f"{row['us_p50']:10.2f} us  {row['gb_s']:8.1f} GB/s {row['percent_of_copy']:6.1f} %  "
        f"{row['peak_mib']:9.2f} MiB  {row['launches']:4} launches"
    )


# -- commands -----------------------------------------------------------------------------------------------------


def bench(names: Sequence[str], device: torch.device, is_check: bool) -> list[Row]:
    """All rows of these operations, printed as they come."""
    if is_check:
        for name in names:
            for dtype in DTYPES:
                check(OPS[name], OPS[name].make(4, (4, 32, 32), dtype, device, 0), choose("triton", device))
            print(f"{name}: right")
        return []
    copy = bandwidth(device)
    print(f"copy bandwidth {copy:.0f} GB/s")
    rows = []
    for name in names:
        for row in rows_of(OPS[name], device, copy):
            rows.append({**row, "copy_gb_s": round(copy, 1), **environment(device)})
            print(shown(row), flush=True)
    return rows


# Options of `dag.bench train-step`: 20 of the 50 steps, so that a slow card ends in time too.
_QUICK = ("--repeats", "1", "--set", "sampler.steps=20")
_TRAINING_ON_A_GPU = {
    "lora_24gb": ("--recipe", "recipes/aesthetic_24gb.yaml", "--cap-gib", "24", "--literal", "--ablation", *_QUICK),
    "full_24gb": ("--recipe", "recipes/full_finetune_24gb.yaml", "--cap-gib", "24", *_QUICK),
    "lora_12gb": ("--recipe", "recipes/aesthetic_12gb.yaml", "--cap-gib", "12", *_QUICK),
}
_TRAINING_ON_A_CPU = {
    "embedded": (
        "--recipe",
        "recipes/tiny_cpu.yaml",
        "--literal",
        "--ablation",
        "--repeats",
        "1",
        "--trajectories",
        "4",
    ),
}


def checklist(out: Path, device: torch.device) -> int:
    """Everything that wants a GPU; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    summary = [f"# GPU checklist\n\n{json.dumps(environment(device), indent=1)}\n"]
    has_gpu, failed = device.type == "cuda", False
    tests = Path(__file__).parents[2] / "tests"
    if tests.is_dir():
        command = [sys.executable, "-m", "pytest", "-q", str(tests / "test_kernels.py")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent)
        (out / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        failed |= done.returncode != 0
        where = "on the GPU" if has_gpu else "through the interpreter"
        summary.append(f"- kernel tests {where}: {'passed' if done.returncode == 0 else 'FAILED, see tests.txt'}")
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dag_kernels.resources", "--json", str(out / "resources.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=without)
    failed |= done.returncode != 0
    summary.append(f"- registers and spills: {'resources.json' if done.returncode == 0 else 'FAILED'}")
    if has_gpu:
        rows = bench(list(OPS), device, is_check=False)
        write_csv(rows, out / "bench.csv")
        (out / "bench.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        plot(rows, out)
        summary.append(f"- benchmark: {len(rows)} rows in bench.csv\n\n```\n" + "\n".join(map(shown, rows)) + "\n```")
    else:
        summary.append("- benchmark: not measured, there is no GPU")
    if tests.is_dir():
        for name, options in (_TRAINING_ON_A_GPU if has_gpu else _TRAINING_ON_A_CPU).items():
            ended_well, said = _train_step(out, name, options, tests.parent)
            failed |= not ended_well
            summary.append(f"- training step, {name}: {'' if ended_well else 'FAILED'}\n\n```\n{said}\n```")
    (out / "summary.md").write_text("\n".join(summary) + "\n", encoding="utf-8")
    print("\n".join(summary))
    return 1 if failed else 0


def _train_step(out: Path, name: str, options: Sequence[str], root: Path) -> tuple[bool, str]:
    """(whether it ended well, what it printed) of the trainer's own bench, in a process of its own."""
    command = [sys.executable, "-m", "dag.bench", "train-step", *options, "--json", str(out / f"train_{name}.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    return done.returncode == 0, done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dag_kernels.bench", description="Time the fused operations.")
    parser.add_argument("--op", choices=list(OPS), action="append", help="only this one; may be repeated")
    parser.add_argument("--check", action="store_true", help="check and do not time")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR")
    parser.add_argument("--checklist", type=Path, metavar="DIR", help="everything that wants a GPU, into DIR")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.checklist is not None:
        return checklist(given.checklist, device)
    if device.type != "cuda" and not (given.check and os.environ.get("TRITON_INTERPRET") == "1"):
        print("there is no GPU: nothing to time (TRITON_INTERPRET=1 ... --check runs on a CPU)", file=sys.stderr)
        return 1
    try:
        rows = bench(given.op or list(OPS), device, given.check)
    except AssertionError as error:
        print(f"wrong, hence not timed: {error}", file=sys.stderr)
        return 1
    if rows and given.csv is not None:
        write_csv(rows, given.csv)
    if rows and given.plot is not None:
        plot(rows, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
