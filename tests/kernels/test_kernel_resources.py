"""Kernels compiled for GPUs without having one: no kernel spills, and none needs more registers than was recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dag_kernels.resources import ARCHITECTURES, RECORDED

pytest.importorskip("triton")

# A consumer's and a data centre's, of which the latter has more shared memory; the others double the time.
COMPILED = (86, 90)


def test_no_kernel_spills_or_has_grown(tmp_path: Path) -> None:
    """The kernels are compiled in a process without the interpreter.

    After a deliberate change: `python -m dag_kernels.resources --json kernels/dag_kernels/results/resources.json`, whose
    difference from the recorded file shows the other architectures too.
    """
    out = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dag_kernels.resources", "--json", str(out), "--sm", *map(str, COMPILED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())
    assert {row["sm"] for row in rows} == set(COMPILED)
    assert [row for row in rows if row["spilled_bytes"]] == []
    recorded = {(row["kernel"], row["dtype"], row["sm"]): row for row in json.loads(RECORDED.read_text())}
    found = {(row["kernel"], row["dtype"]) for row in rows}
    assert recorded.keys() == {(*kind, sm) for kind in found for sm in ARCHITECTURES}
    assert [row for row in recorded.values() if row["spilled_bytes"]] == []
    for row in rows:
        before = recorded[row["kernel"], row["dtype"], row["sm"]]
        grown = [name for name in ("registers", "shared_bytes") if row[name] > before[name]]
        assert not grown, f"{row} needs more than {before}"
