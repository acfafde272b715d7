"""Who imports whom. The order below is the architecture: a file may use what stands above it, never what stands below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports only from earlier rows; within a row only its own package's submodules. Rows with the same
# number are one level of the design, split where one of its modules stands on another.
LAYERS = (
    (0, ("dag_kernels", "dag.errors", "dag.registry", "dag.durable", "dag.fingerprint", "dag.machine", "dag.quiet")),
    (0, ("dag.processes", "dag.interrupt", "dag.gpu", "dag.determinism")),
    (0, ("dag.hub",)),
    (0, ("dag.section",)),
    (0, ("dag.reward_terms",)),
    (0, ("dag.recipe",)),
    (0, ("dag.recipe_file",)),
    (1, ("dag.prompt_sets",)),
    (1, ("dag.schedule", "dag.prompts", "dag.metrics", "dag.balance")),
    (1, ("dag.protocols", "dag.run_folder")),
    (
        2,
        (
            "dag.trajectory",
            "dag.state_flow",
            "dag.fidelity",
            "dag.accounting",
            "dag.ledger",
            "dag.statistics",
            "dag.perceptual",
            "dag.curves",
        ),
    ),
    (2, ("dag.units", "dag.embeddings")),
    (3, ("dag.models", "dag.rewards", "dag.objectives")),
    (4, ("dag.rollout", "dag.checkpoint", "dag.optimizer_state", "dag.plan", "dag.report")),
    (4, ("dag.progress", "dag.faults", "dag.rest")),
    (4, ("dag.optim",)),
    (4, ("dag.flow_fit", "dag.evaluation")),
    (4, ("dag.loss", "dag.updates")),
    (4, ("dag.learner",)),
    (4, ("dag.one_pass",)),
    (5, ("dag.parts", "dag.simulation")),
    (5, ("dag.records", "dag.forecast")),
    (5, ("dag.saving",)),
    (5, ("dag.trainer",)),
    (6, ("dag.published", "dag.flops", "dag.approximations", "dag.study", "dag.figures", "dag.rehearsal")),
    (6, ("dag.timing", "dag.limited", "dag.stages")),
    (6, ("dag.profiling", "dag.trial_run")),
    (6, ("dag.checklist",)),
    (6, ("dag.missing",)),
    (6, ("dag.measure",)),
    (6, ("dag.verdict",)),
    (6, ("dag.evaluate", "dag.suites")),
    (6, ("dag.launch",)),
    (6, ("train_dag", "dag.bench", "dag.sample", "dag.score", "dag.reproduce", "dag.assets.build")),
)
ROW = {unit: row for row, (_, units) in enumerate(LAYERS) for unit in units}

# Libraries with one home. A missing library must not break what does not need it, and a change of its API must
# not reach further.
HOMES = {
    "diffusers": ("dag.models", "dag.assets.build"),
    "peft": ("dag.models",),
    "transformers": ("dag.models", "dag.rewards", "dag.assets.build"),
    "tokenizers": ("dag.assets.build",),
    "triton": ("dag_kernels",),
    "accelerate": ("dag.launch", "dag.processes"),
    "bitsandbytes": ("dag.optim", "dag.models"),
    "huggingface_hub": ("dag.hub",),
    "torchmetrics": ("dag.perceptual",),
    "dreamsim": ("dag.perceptual",),
    "matplotlib": ("dag.report", "dag.figures", "dag_kernels"),
    "pydantic": ("dag.section", "dag.reward_terms", "dag.recipe", "dag.recipe_file"),
    "pickle": (),
    "dill": (),
    "joblib": (),
    "tests": (),
}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the project."""
    found = {"train_dag": ROOT / "train_dag.py"}
    for source_root, package in ((ROOT, "dag"), (ROOT / "kernels", "dag_kernels")):
        for path in (source_root / package).rglob("*.py"):
            parts = path.relative_to(source_root).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
CODE = {name: path for name, path in MODULES.items() if path.read_text(encoding="utf-8").strip()}


def imports(source: str) -> Iterator[str]:
    """Every module a source imports, wherever in the file; `from dag import recipe` counts as dag.recipe."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute here"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (submodule if submodule in MODULES else node.module for submodule in submodules)


def unit_of(module: str) -> str | None:
    """The entry of LAYERS a module belongs to."""
    return next((unit for unit in ROW if module == unit or module.startswith(f"{unit}.")), None)


def misplaced(module: str, source: str) -> list[str]:
    """The imports of a module that break the order."""
    unit = unit_of(module)
    assert unit is not None, f"{module}: give it a place in LAYERS"
    targets = {
        name: unit_of(name) for name in imports(source) if name.split(".")[0] in ("dag", "dag_kernels", "train_dag")
    }
    return [name for name, target in targets.items() if target is None or (target != unit and ROW[target] >= ROW[unit])]


def homeless(module: str, source: str) -> list[str]:
    """The libraries a module imports although they live elsewhere."""
    libraries = {name.split(".")[0] for name in imports(source)}
    return [library for library in libraries if library in HOMES and unit_of(module) not in HOMES[library]]


def unsafe_loads(source: str) -> list[str]:
    """Calls of torch.load (or numpy's with pickles) that would run code from a file."""
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
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    assert misplaced(module, CODE[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", CODE)
def test_libraries_stay_at_home(module: str) -> None:
    source = CODE[module].read_text(encoding="utf-8")
    assert homeless(module, source) == []
    assert unsafe_loads(source) == []


def test_the_order_names_only_what_exists() -> None:
    assert [unit for unit in ROW if unit not in MODULES] == []
    assert [level for level, _ in LAYERS] == sorted(level for level, _ in LAYERS)


def test_the_schema_and_the_command_line_import_no_torch() -> None:
    """--plan and mistakes must answer at once."""
    torch_free = {
        "dag.recipe",
        "dag.recipe_file",
        "dag.errors",
        "dag.hub",
        "dag.registry",
        "dag.metrics",
        "dag.prompts",
        "dag.prompt_sets",
        "dag.run_folder",
        "dag.section",
        "dag.durable",
        "dag.interrupt",
        "dag.reward_terms",
        "dag.plan",
        "dag.quiet",
    }
    torch_free |= {"dag.models.source", "dag.models", "train_dag"}
    for module in torch_free:
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        names = set(imports(ast.unparse(top)))
        assert not {
            name for name in names if name.split(".")[0] in ("torch", "diffusers", "transformers", "accelerate")
        }, module
        assert {name for name in names if name.startswith("dag.")} <= torch_free, module


# -- the rules themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("dag.recipe", "from dag.schedule import Schedule", ["dag.schedule"]),
        ("dag.schedule", "import dag_kernels.reference", []),
        ("dag.schedule", "from dag import balance", ["dag.balance"]),
        ("dag.rollout", "def f():\n    from dag.learner import Learner", ["dag.learner"]),
        ("dag.learner", "from dag.rollout import look_ahead", []),
        ("dag.learner", "from dag.trainer import Trainer", ["dag.trainer"]),
        ("dag.rewards.jpeg", "from dag.rewards.registry import REWARDS", []),
        ("dag.rewards.jpeg", "from dag.models.source import resolve", ["dag.models.source"]),
        ("dag_kernels.reference", "import dag.errors", ["dag.errors"]),
        ("dag.trainer", "import train_dag", ["train_dag"]),
        ("dag.trainer", "from dag import unheard_of", ["dag"]),
    ],
)
def test_the_order_is_enforced(module: str, source: str, expected: list[str]) -> None:
    assert misplaced(module, source) == expected


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("dag.evaluation", "from transformers import CLIPModel", ["transformers"]),
        ("dag.rewards.image_text", "from transformers import CLIPModel", []),
        ("dag.rollout", "def f():\n    import diffusers.utils", ["diffusers"]),
        ("dag.schedule", "import triton.language as tl", ["triton"]),
        ("dag.learner", "from accelerate import Accelerator", ["accelerate"]),
        ("dag.checkpoint", "import pickle", ["pickle"]),
    ],
)
def test_the_homes_are_enforced(module: str, source: str, expected: list[str]) -> None:
    assert homeless(module, source) == expected


def test_unsafe_loads_are_found() -> None:
    unsafe = ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"]
    safe = ["torch.load(p, weights_only=True)", "np.load(p)"]
    assert unsafe_loads("\n".join(unsafe + safe)) == unsafe
