"""Which module may import which. FLOORS is the architecture: a module imports from lower floors, never from higher ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the lowest floor up. Folders on one floor never import each other; inside a folder only circles are forbidden.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("dag_kernels", "dag.errors", "dag.quiet"),
    ("dag.hub",),
    ("dag.recipe",),
    ("dag.chain", "dag.run"),
    ("dag.models", "dag.rewards", "dag.objectives"),
    ("dag.evaluation",),
    ("dag.training", "dag.steering"),
    ("dag.costs",),
    ("dag.checklist",),
)
# Programs with a command line. They may import everything, and nothing imports them.
DOORS = (
    "train_dag",
    "dag.bench",
    "dag.evaluate",
    "dag.new",
    "dag.publish",
    "dag.report",
    "dag.reproduce",
    "dag.sample",
    "dag.score",
    "dag.search",
    "dag.assets.build",
)
FLOOR = {folder: floor for floor, folders in enumerate((*FLOORS, DOORS)) for folder in folders}

# Libraries, and the only folders that may import them: if a library is missing or its interface changes, the rest still works.
HOMES = {
    "diffusers": ("dag.models", "dag.assets.build"),
    "peft": ("dag.models",),
    "transformers": ("dag.models", "dag.rewards", "dag.assets.build"),
    "tokenizers": ("dag.assets.build",),
    "bitsandbytes": ("dag.models", "dag.training"),
    "accelerate": ("dag.run", "dag.training"),
    "triton": ("dag_kernels",),
    "huggingface_hub": ("dag.hub",),
    "torchmetrics": ("dag.evaluation",),
    "dreamsim": ("dag.evaluation",),
    "matplotlib": ("dag.evaluation", "dag_kernels"),
    "pydantic": ("dag.recipe",),
    "pickle": (),
    "dill": (),
    "joblib": (),
    "tests": (),
}

# Modules that do not import torch when they are imported, so that `train_dag.py --plan` and a mistake are answered quickly.
TORCH_FREE = (
    "train_dag",
    "dag.errors",
    "dag.hub",
    "dag.quiet",
    "dag.recipe",
    "dag.run.folder",
    "dag.run.metrics",
    "dag.run.durable",
    "dag.run.locks",
    "dag.run.signals",
    "dag.models.source",
    "dag.training.plan",
)
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft"}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the project."""
    found = {"train_dag": ROOT / "train_dag.py"}
    for source_root, package in ((ROOT, "dag"), (ROOT / "kernels", "dag_kernels")):
        for path in (source_root / package).rglob("*.py"):
            parts = path.relative_to(source_root).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
CODE = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items() if path.stat().st_size}


def imports(source: str) -> Iterator[str]:
    """Every module that a source file imports, also inside functions; `from dag import recipe` counts as dag.recipe."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute here"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (submodule if submodule in MODULES else node.module for submodule in submodules)


def imports_at_start(source: str) -> set[str]:
    """The modules that are imported when this one is, not inside functions."""
    top: list[ast.stmt] = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set(imports(ast.unparse(ast.Module(top, []))))


def folder_of(module: str) -> str | None:
    """The entry of FLOOR that a module belongs to."""
    return next((folder for folder in FLOOR if module == folder or module.startswith(f"{folder}.")), None)


def misplaced(module: str, source: str) -> list[str]:
    """The imports of a module that are neither on a lower floor nor in its own folder."""
    folder = folder_of(module)
    assert folder is not None, f"{module}: give it a place in FLOORS"
    ours = {
        name: folder_of(name) for name in imports(source) if name.split(".")[0] in ("dag", "dag_kernels", "train_dag")
    }
    return [
        name for name, target in ours.items() if target is None or (target != folder and FLOOR[target] >= FLOOR[folder])
    ]


def homeless(module: str, source: str) -> list[str]:
    """The libraries that a module imports although HOMES does not allow it."""
    libraries = {name.split(".")[0] for name in imports(source)}
    return [library for library in libraries if library in HOMES and folder_of(module) not in HOMES[library]]


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, with the first again at the end; empty if there is no circle."""
    arrows = {name: [target for target in imports(source) if target in sources] for name, source in sources.items()}
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (walk(target, [*path, name]) for target in arrows[name] if target != name)), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sources)), [])


def unsafe_loads(source: str) -> list[str]:
    """Calls of torch.load, or of numpy's load with pickles, that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_torch = ast.unparse(node.func) == "torch.load"
            if keywords.get("weights_only") != "True" if is_torch else keywords.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
    return found


# -- the project --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", CODE)
def test_a_module_imports_from_lower_floors_and_keeps_libraries_at_home(module: str) -> None:
    assert misplaced(module, CODE[module]) == []
    assert homeless(module, CODE[module]) == []
    assert unsafe_loads(CODE[module]) == []


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert circle(CODE) == []


def test_the_floors_name_only_what_exists() -> None:
    assert [folder for folder in FLOOR if folder not in MODULES] == []


def test_what_plans_a_run_imports_no_torch() -> None:
    free = [name for name in CODE if name.startswith("dag.recipe.")] + [name for name in TORCH_FREE if name in CODE]
    for module in free:
        at_start = imports_at_start(CODE[module])
        assert not {name for name in at_start if name.split(".")[0] in HEAVY}, module
        assert {name for name in at_start if name.startswith("dag.")} <= set(free), module


# -- the rules themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("dag.recipe.schema", "from dag.chain.schedule import Schedule", ["dag.chain.schedule"]),
        ("dag.chain.schedule", "import dag_kernels.reference", []),
        ("dag.chain.schedule", "from dag.run import durable", ["dag.run.durable"]),
        ("dag.chain.rollout", "def f():\n    from dag.training.trainer import Trainer", ["dag.training.trainer"]),
        ("dag.training.trainer", "from dag.chain.rollout import Batch", []),
        ("dag.rewards.jpeg", "from dag.rewards.registry import REWARDS", []),
        ("dag.rewards.jpeg", "from dag.models.source import resolve", ["dag.models.source"]),
        ("dag_kernels.reference", "import dag.errors", ["dag.errors"]),
        ("dag.training.trainer", "import train_dag", ["train_dag"]),
        ("dag.sample", "from dag.evaluate import main", ["dag.evaluate"]),
        ("dag.training.trainer", "from dag import unheard_of", ["dag"]),
    ],
)
def test_the_floors_are_enforced(module: str, source: str, expected: list[str]) -> None:
    assert misplaced(module, source) == expected


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("dag.evaluation.fixed", "from transformers import CLIPModel", ["transformers"]),
        ("dag.rewards.clip_score", "from transformers import CLIPModel", []),
        ("dag.chain.rollout", "def f():\n    import diffusers.utils", ["diffusers"]),
        ("dag.chain.schedule", "import triton.language as tl", ["triton"]),
        ("dag.objectives.ddpo", "from accelerate import Accelerator", ["accelerate"]),
        ("dag.run.checkpoint", "import pickle", ["pickle"]),
    ],
)
def test_the_homes_are_enforced(module: str, source: str, expected: list[str]) -> None:
    assert homeless(module, source) == expected


def test_a_ring_is_found() -> None:
    one, two, three = "dag.run.folder", "dag.run.metrics", "dag.run.durable"
    line = {one: f"import {two}", two: f"def f():\n    import {three}", three: ""}
    assert circle(line) == []
    assert circle({**line, three: f"import {one}"}) == [one, two, three, one]


def test_unsafe_loads_are_found() -> None:
    unsafe = ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"]
    safe = ["torch.load(p, weights_only=True)", "np.load(p)"]
    assert unsafe_loads("\n".join(unsafe + safe)) == unsafe
