"""Promise: the package's modules import each other in one direction, so that each can be read, and imported, without the rest."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import ltkernels as ltk

ROOT = Path(ltk.__file__).parent


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from imports(node.body + node.orelse)
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from imports(node.body)


def needs(file: Path, known: set[str]) -> set[str]:
    own = module_of(file)
    package = own if file.name == "__init__.py" else own.rpartition(".")[0]
    found = set()
    for node in imports(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            name = f"{base}.{alias.name}"
            found.add(name if name in known or name == "ltkernels._C" else base)
    return (found & known) - {own}


def test_no_circles() -> None:
    files = [file for file in ROOT.rglob("*.py") if "benchmarks" not in file.parts]
    known = {module_of(file) for file in files}
    graph = {module_of(file): needs(file, known) for file in files}
    assert graph["ltkernels.losses._door"] >= {"ltkernels._call", "ltkernels._watch", "ltkernels.losses._terms"}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules of a circle
    assert len(order) == len(known)
