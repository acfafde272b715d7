"""The shape of the code in numbers: `python tests/by_hand/structure.py [ROOT]`.

Import arrows between files, folders and their floors, and the longest and the most deeply nested functions. A floor is the
longest chain of imports below a module; what forms a ring stands together. Folders count as one box each in the last lines.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

Arrows = dict[str, set[str]]
_NESTING = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef | ast.ClassDef
_PACKAGES = (("dag", "dag"), ("kernels/dag_kernels", "dag_kernels"))


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module of the project; those that build the shipped assets are left out."""
    found = {"train_dag": root / "train_dag.py"}
    for folder, package in _PACKAGES:
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join((package, *path.relative_to(root / folder).with_suffix("").parts)).removesuffix(".__init__")
            if path.read_text(encoding="utf-8").strip() and not name.startswith("dag.assets"):
                found[name] = path
    return found


def arrows(files: dict[str, Path]) -> Arrows:
    """The modules of the project that each imports, also inside functions."""
    return {name: set(_imports(path, set(files))) - {name} for name, path in files.items()}


def _imports(path: Path, known: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                yield from {target if target in known else str(node.module)} & known


def floors(below: Arrows) -> dict[str, int]:
    """The longest chain of imports below each box, counted from 1."""
    found: dict[str, int] = {}

    def floor(name: str, path: tuple[str, ...]) -> int:
        if name not in found:
            rest = [target for target in below[name] if target not in path]
            found[name] = 1 + max((floor(target, (*path, name)) for target in rest), default=0)
        return found[name]

    for name in below:
        floor(name, ())
    return found


def boxes(below: Arrows) -> Arrows:
    """The same arrows with every folder of `dag` as one box."""
    box = {name: ".".join(name.split(".")[:2]) if name.startswith("dag.") else name.split(".")[0] for name in below}
    joined: Arrows = {name: set() for name in box.values()}
    for name, targets in below.items():
        joined[box[name]] |= {box[target] for target in targets} - {box[name]}
    return joined


def functions(files: dict[str, Path]) -> Iterator[tuple[str, int, int]]:
    """(name, lines, deepest nesting) of every function."""
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{module}.{node.name}", lines, max(map(_depth, node.body), default=0)


def _depth(node: ast.AST) -> int:
    """How deep statements are nested; an `elif` is no deeper than its `if`."""
    inner = list(ast.iter_child_nodes(node))
    beside = (
        node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If) else []
    )
    deepest = max((_depth(child) for child in inner if child not in beside), default=0)
    return max(deepest + isinstance(node, _NESTING), *map(_depth, beside), 0)


def main(root: Path) -> None:
    files = modules(root)
    below = arrows(files)
    found = sorted(functions(files), key=lambda function: function[1])
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    folders = boxes(below)
    print(f"files          {len(files)}, {sum(lines.values())} lines, the longest {max(lines.values())}")
    print(f"               arrows {sum(map(len, below.values()))}, floors {max(floors(below).values())}")
    print(f"flat in dag/   {sum(path.parent.name == 'dag' for path in files.values())}")
    print(
        f"boxes          {len(folders)}, arrows {sum(map(len, folders.values()))}, floors {max(floors(folders).values())}"
    )
    print(f"functions      {len(found)}; the longest: " + ", ".join(f"{name} {n}" for name, n, _ in found[-3:][::-1]))
    deepest = sorted(found, key=lambda function: function[2])[-3:][::-1]
    print("               the deepest: " + ", ".join(f"{name} {depth}" for name, _, depth in deepest))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2])
