"""The house rules: layers, lengths, documentation."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minigen"
MODULES = sorted(PACKAGE.glob("*.py"))
LAYER = {
    "core": 0,
    "bound": 1, "samplers": 1, "ladder": 1, "laws": 1, "images": 1, "multiply": 1, "fields": 1,
    "layers": 1,
    "chain": 2, "binary": 2, "ncsn": 2, "pfgm": 2, "pfgmpp": 2, "charges": 2, "ink": 2,
    "nets": 2, "data": 2, "readout": 2,
    "dpm": 3, "ddpm": 3, "recipe": 3, "processes": 3, "log": 3, "evaluate": 3, "viz": 3,
    "methods": 4, "checkpoint": 4, "generate": 4, "options": 4,
    "train": 5, "compare": 5, "classifier": 5, "likelihood": 5, "fit": 6, "features": 6,
    "commands": 7, "measure": 7, "__main__": 8, "__init__": 8,
}  # fmt: skip
ONLY_ABOVE = {"matplotlib": 3, "ipywidgets": 3, "accelerate": 3, "torchmetrics": 3, "tqdm": 3, "tyro": 4}


def imports(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            out |= {f".{node.module}"} if node.module else {f".{a.name}" for a in node.names if a.name in LAYER}
        elif isinstance(node, ast.ImportFrom):
            out.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            out |= {a.name.split(".")[0] for a in node.names}
    return out


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_layers(path):
    mine = LAYER[path.stem]
    for name in imports(path):
        if name.startswith("."):
            assert LAYER[name[1:].split(".")[0]] < mine, f"{path.stem} (layer {mine}) imports {name}"
        assert mine >= ONLY_ABOVE.get(name, 0), f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_lengths_and_documentation(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 260, "one idea per module"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_"):
            assert ast.get_docstring(node) or is_nested(tree, node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 42, f"{node.name} is too long"
            args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            missing = [a.arg for a in args if a.annotation is None and a.arg not in ("self", "cls")]
            assert not missing, f"{node.name}: {missing} without a type"
            assert node.returns is not None, f"{node.name} does not say what it returns"


def is_nested(tree: ast.Module, node: ast.AST) -> bool:
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f is not node]
    return any(node in ast.walk(f) for f in functions)
