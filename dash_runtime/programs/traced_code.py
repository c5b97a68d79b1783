"""The code that compiled programs depend on, as text to be hashed.

Follows imports, so that nothing can be left out. Leaves out docstrings and comments: editing one must not make every
user compile again for minutes. Knows sources; imports none of them.
"""

import ast
from pathlib import Path

_ROOTS = ("programs.compile_program", "programs.example_inputs")
_ROOMS = ("linears", "programs")
"""Imports from other rooms do not reach the compiler, or are part of a program's specification."""


def traced_code(package: Path) -> dict[str, str]:
    """Returns the syntax trees of the traced modules below `package`, by module name."""
    trees: dict[str, str] = {}
    waiting = list(_ROOTS)
    while waiting:
        module = waiting.pop()
        if module in trees:
            continue
        tree = ast.parse(package.joinpath(*module.split(".")).with_suffix(".py").read_text())
        waiting += _imported(tree, package)
        trees[module] = ast.dump(_WithoutTexts().visit(tree))
    return dict(sorted(trees.items()))


def _imported(tree: ast.AST, package: Path) -> list[str]:
    """Returns the modules of `_ROOMS` that are imported anywhere in the tree."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    inner = [name.removeprefix(f"{package.name}.") for name in names if name.startswith(f"{package.name}.")]
    files = {name: package.joinpath(*name.split(".")).with_suffix(".py") for name in inner}
    return [name for name, file in files.items() if name.split(".")[0] in _ROOMS and file.is_file()]


class _WithoutTexts(ast.NodeTransformer):
    """Removes every expression that is only a text."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | ast.Pass:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_text else node
