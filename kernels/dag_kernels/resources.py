"""Registers, spills and shared memory of the kernels, found without a GPU by Triton's own compiler.

    python -m dag_kernels.resources [--sm 90] [--json FILE]

Does not work with TRITON_INTERPRET=1, with which kernels are Python functions.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dag_kernels.table import markdown

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
LATENT_DTYPES = ("fp16", "fp32")
RECORDED = Path(__file__).parent / "results" / "resources.json"

Row = dict[str, str | int]


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """Yield (name, kernel, signature, compile-time values, warps) of each kernel.

    In signatures LATENT stands for the dtype of latents.
    """
    from dag_kernels import balance, sampling, transition

    yield from _norm_kernels()
    latents = dict.fromkeys(("x_t", "x_next", "output", "reference", "old"), "*LATENT")
    strides = [f"stride_{name}" for name in ("t", "next", "output", "reference", "old")]
    sizes = dict.fromkeys(("num_samples", "D", *strides), "i32") | {"guidance": "fp32"}
    options = {"GUIDED": True, "HAS_REFERENCE": True, "HAS_OLD": True, "BLOCK": transition.BLOCK}
    common = latents | {"table": "*fp32", "k": "*i64"}
    forward, backward = {"result": "*fp32"}, {"upstream": "*fp32", "gradient": "*LATENT"}
    yield (
        "transition forward",
        transition.transition_log_probs_fwd_kernel,
        common | forward | sizes,
        options,
        transition.NUM_WARPS,
    )
    yield (
        "transition backward",
        transition.transition_log_probs_bwd_kernel,
        common | backward | sizes,
        options,
        transition.NUM_WARPS,
    )

    step = dict.fromkeys(("x_t", "output"), "*LATENT") | {"table": "*fp32", "sample_id": "*i64"}
    step |= {"x_next": "*LATENT", "x0_hat": "*fp32", "result": "*fp32", "seed": "i64"}
    step |= dict.fromkeys(("k", "num_samples", "D", "stride_t", "stride_output"), "i32") | {"guidance": "fp32"}
    yield (
        "sampling step",
        sampling.sampling_step_fwd_kernel,
        step,
        {"GUIDED": True, "BLOCK": sampling.BLOCK},
        transition.NUM_WARPS,
    )

    columns = ("log_F", "log_pf", "log_pb", "log_F_next", "log_looking", "log_looking_next", "log_reward")
    loss = dict.fromkeys(columns, "*fp32") | {"is_terminal": "*i1"}
    loss |= dict.fromkeys(("scale", "weight", "result"), "*fp32") | {"num_rows": "i32", "huber": "fp32"}
    switches = ("HAS_LOOKING", "HAS_END", "HAS_SCALE", "HAS_WEIGHT", "HAS_HUBER")
    options = dict.fromkeys(switches, True) | {"DETACH_NEXT": False, "BLOCK": balance.BLOCK}
    yield "balance", balance.detailed_balance_fwd_kernel, loss, options, 4


def _norm_kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """The kernels of the group normalisation, with SiLU."""
    from dag_kernels import norm_groups, norm_tiles

    shape, tile = dict.fromkeys(("num_rows", "C"), "i32"), {"ROWS": norm_tiles.ROWS, "CHANNELS": norm_tiles.CHANNELS}
    sums, shape_of_sum = {"ROWS": norm_tiles.ROWS, "BLOCK": norm_tiles.BLOCK}, shape | {"groups": "i32", "tiles": "i32"}
    x, table = {"x": "*LATENT"}, {"table": "*fp32"}
    inputs = x | dict.fromkeys(("weight", "bias"), "*LATENT") | {"statistics": "*fp32"}
    shape_of_map, with_silu = shape | {"groups": "i32"}, {"HAS_SILU": True, **tile}
    warps, few = norm_tiles.NUM_WARPS, 4
    width = 16  # of the finest map of a UNet with 320 channels, the largest there
    a_group = {"HAS_SILU": True, "ROWS": norm_groups.STEP // width, "WIDTH": width}
    yield (
        "norm forward",
        norm_groups.group_norm_fwd_kernel,
        inputs | {"y": "*LATENT"} | shape_of_map | {"eps": "fp32"},
        a_group,
        warps,
    )
    small = inputs | {"dy": "*LATENT", "dx": "*LATENT"} | shape_of_map
    yield "norm backward", norm_groups.group_norm_bwd_kernel, small, a_group, warps
    yield "tiled norm moments", norm_tiles.tile_moments_kernel, x | table | shape, tile, warps
    statistics = table | {"statistics": "*fp32"} | shape_of_sum | {"eps": "fp32"}
    yield "tiled norm statistics", norm_tiles.tile_statistics_kernel, statistics, sums, few
    forward = inputs | {"y": "*LATENT"} | shape_of_map
    yield "tiled norm forward", norm_tiles.tile_fwd_kernel, forward, with_silu, warps
    slopes = inputs | {"dy": "*LATENT"} | table | shape_of_map
    yield "tiled norm slopes", norm_tiles.tile_slopes_kernel, slopes, with_silu, warps
    yield "tiled norm means", norm_tiles.tile_means_kernel, table | {"means": "*fp32"} | shape_of_sum, sums, few
    backward = inputs | {"dy": "*LATENT", "means": "*fp32", "dx": "*LATENT"} | shape_of_map
    yield "tiled norm backward", norm_tiles.tile_bwd_kernel, backward, with_silu, warps


def measure(architectures: tuple[int, ...] = ARCHITECTURES, dtypes: tuple[str, ...] = LATENT_DTYPES) -> list[Row]:
    """One row for each kernel, dtype and architecture."""
    rows: list[Row] = []
    for name, kernel, signature, constants, warps in kernels():
        uses_latents = any("LATENT" in kind for kind in signature.values())
        for dtype in dtypes if uses_latents else ("fp32",):
            typed = {parameter: kind.replace("LATENT", dtype) for parameter, kind in signature.items()}
            for architecture in architectures:
                used = _compile(kernel, typed, constants, warps, architecture)
                rows.append({"kernel": name, "dtype": dtype, "sm": architecture, **used})
    return rows


def _compile(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, architecture: int
) -> dict[str, int]:
    """Registers, spilled bytes and shared bytes of a kernel, compiled for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    typed = signature | dict.fromkeys(constants, "constexpr")
    # Pointers and sizes are multiples of 16, as they are at the recipes' shapes.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(typed.values()) if kind[0] == "*" or kind == "i32"
    }
    source = ASTSource(fn=kernel, signature=typed, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    return _ptxas(compiled.asm["ptx"], architecture) | {"shared_bytes": int(compiled.metadata.shared)}


def _ptxas(ptx: str, architecture: int) -> dict[str, int]:
    """Registers per thread and spilled bytes, as ptxas reports them."""
    import triton

    binaries = Path(triton.__file__).parent / "backends/nvidia/bin"
    name = "ptxas-blackwell" if architecture >= 100 and (binaries / "ptxas-blackwell").exists() else "ptxas"
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [str(binaries / name), "-v", f"-arch=sm_{architecture}{suffix}", str(path), "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", report), re.findall(r"(\d+) bytes spill", report)
    assert registers is not None, report
    return {"registers": int(registers[1]), "spilled_bytes": sum(map(int, spills))}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dag_kernels.resources")
    parser.add_argument(
        "--sm", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="architectures; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    rows = measure(tuple(arguments.sm))
    print(markdown(rows, ("kernel", "dtype", "sm", "registers", "spilled_bytes", "shared_bytes")))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
