"""Finds which recipe keys a module reads, so that a test can refuse keys that nothing reads."""

import ast
import typing
from collections.abc import Iterator
from typing import Any

from dag import recipe
from dag.recipe import (
    data_sections,
    first_order_sections,
    network_sections,
    objective_sections,
    reward_sections,
    schema,
    search_sections,
    table_sections,
)
from dag.recipe.section import Section

SCHEMAS = {
    "dag.recipe": recipe,
    "dag.recipe.schema": schema,
    "dag.recipe.network_sections": network_sections,
    "dag.recipe.data_sections": data_sections,
    "dag.recipe.objective_sections": objective_sections,
    "dag.recipe.first_order_sections": first_order_sections,
    "dag.recipe.table_sections": table_sections,
    "dag.recipe.reward_sections": reward_sections,
    "dag.recipe.search_sections": search_sections,
}


def sections_below(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all sections that its keys can hold, directly or not."""
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections_below(inner)


def sections_in(annotation: Any) -> set[type[Section]]:
    """The sections that a type annotation of the schema mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}
    return {section for argument in typing.get_args(annotation) for section in sections_in(argument)}


def names_in(annotation: Any) -> set[str]:
    """Names of the sections that a type annotation allows: those that it mentions, and their subclasses."""
    allowed = tuple(sections_in(annotation))
    return {name for name, section in SECTIONS.items() if issubclass(section, allowed)}


def names_behind(section: type[Section], attribute: str) -> set[str]:
    """Names of the sections that a key or a property of a section holds."""
    if field := section.model_fields.get(attribute):
        return names_in(field.annotation)
    found = getattr(section, attribute, None)
    return names_in(typing.get_type_hints(found.fget)["return"]) if isinstance(found, property) else set()


SECTIONS = {
    section.__name__: section
    for top in (recipe.Recipe, search_sections.SearchRecipe)
    for section in sections_below(top)
}
FIELDS = {(name, field) for name, section in SECTIONS.items() for field in section.model_fields}


class Reader(ast.NodeVisitor):
    """Finds which keys of which sections a module reads, by following names from annotated parameters.

    The order of statements does not matter: every assignment to a name adds to the sections that the name may be. A dump of
    a section counts as reading its keys; a dump of the complete recipe is a record of the run and counts as reading none.
    """

    def __init__(self, module: ast.Module) -> None:
        self.reads: set[tuple[str, str]] = set()
        self.types: dict[str, set[str]] = {}
        self.imported = dict(self._imports(module))
        size = -1
        while size != (size := sum(map(len, self.types.values()))):
            self.visit(module)

    @staticmethod
    def _imports(module: ast.Module) -> Iterator[tuple[str, set[str]]]:
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.module in SCHEMAS:
                for alias in node.names:
                    yield alias.asname or alias.name, names_in(getattr(SCHEMAS[node.module], alias.name, None))

    def annotated(self, annotation: ast.expr | None) -> set[str]:
        if annotation is None:
            return set()
        found: set[str] = set()
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name):
                found |= self.imported.get(node.id, set())
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("recipe", "dag.recipe"):
                found |= names_in(getattr(recipe, node.attr, None))
        return found

    def infer(self, node: ast.expr) -> set[str]:
        found = set(self.types.get(ast.unparse(node), set()))
        if isinstance(node, ast.Attribute):
            for owner in self.infer(node.value):
                found |= names_behind(SECTIONS[owner], node.attr)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            found |= {"Recipe"} if function in ("load", "parse") else self.types.get(f"{function}()", set())
        elif isinstance(node, ast.IfExp):
            found |= self.infer(node.body) | self.infer(node.orelse)
        return found

    def learn(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, entry in zip(target.elts, value.elts, strict=False):
                self.learn(part, entry)
        elif found := self.infer(value):
            self.types.setdefault(ast.unparse(target), set()).update(found)

    def visit_arg(self, node: ast.arg) -> None:
        if found := self.annotated(node.annotation):
            self.types.setdefault(node.arg, set()).update(found)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """An objective's base names the section that it keeps: `class DetailedBalance(Plain[Config])`."""
        for base in node.bases:
            if isinstance(base, ast.Subscript) and (found := self.annotated(base.slice)):
                self.types.setdefault("self.config", set()).update(found)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list):
            self.types.setdefault(f"self.{node.name}", set()).update(self.annotated(node.returns))
        else:
            self.types.setdefault(f"{node.name}()", set()).update(self.annotated(node.returns))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.learn(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        entries = node.iter.elts if isinstance(node.iter, ast.Tuple | ast.List) else [node.iter]
        for entry in entries:
            self.learn(node.target, entry)
        self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.reads |= {(owner, node.attr) for owner in self.infer(node.value)} & FIELDS
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "model_dump":
            skipped = {
                name
                for keyword in node.keywords
                if keyword.arg == "exclude"
                for name in ast.literal_eval(keyword.value)
            }
            owners = self.infer(node.func.value) - {"Recipe"}
            self.reads |= {(owner, field) for owner, field in FIELDS if owner in owners and field not in skipped}
        self.generic_visit(node)


def properties_of(source: str) -> str:
    """The properties in a module of the schema. Its other functions only check keys, which does not count as reading."""
    kept: list[ast.stmt] = []
    for section in [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]:
        for function in [node for node in section.body if isinstance(node, ast.FunctionDef)]:
            if any(ast.unparse(decorator) == "property" for decorator in function.decorator_list):
                function.args.args[0].annotation = ast.Name(section.name)
                kept.append(function)
    sections = f"from dag.recipe import {', '.join(SECTIONS)}, Balance, OnPictures, ScalarBalance, Target, ValueBalance"
    return f"{sections}\n{ast.unparse(ast.Module(kept, []))}"


def fields_read(source: str) -> set[tuple[str, str]]:
    return Reader(ast.parse(source)).reads
