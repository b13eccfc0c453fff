"""Names are nouns of the field, and one public name means one thing."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRONOUNS = {
    "found",
    "one",
    "given",
    "made",
    "said",
    "shown",
    "own",
    "rest",
    "mine",
    "theirs",
    "here",
    "told",
}
# Classes that every family has, entry points beside what they call, files of checkpoints and of
# models, and what the standalone runtime of an exported folder has of its own.
FAMILIES = {"ImageOnly", "Info", "Processor"}
SHARED = FAMILIES | {
    "evaluate",
    "serve",
    "build",
    "read",
    "save",
    "load",
    "choose",
    "greedy",
    "Kept",
}


def bound(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every variable, parameter and function that a file binds."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append((node.lineno, node.name))
    return names


def test_no_name_is_a_pronoun_or_a_participle() -> None:
    vague = []
    for folder in ("src", "examples", "experiments", "docs/images"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, name in bound(ast.parse(path.read_text())):
                if name in PRONOUNS:
                    vague.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert vague == []


def test_a_public_name_has_one_meaning() -> None:
    homes = defaultdict(list)
    for path in sorted((ROOT / "src/tprl").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT / "src/tprl")))
    assert {
        name: paths for name, paths in homes.items() if len(paths) > 1 and name not in SHARED
    } == {}


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def test_comprehensions_are_neither_nested_nor_crowded() -> None:
    """One comprehension a line, and none inside another: what it does is read at once, or it is a
    loop."""
    crowded = []

    def visit(node: ast.AST, path: Path, inside: bool, lines: set[int]) -> None:
        for child in ast.iter_child_nodes(node):
            comprehension = isinstance(child, COMPREHENSIONS)
            if comprehension and (inside or child.lineno in lines):
                crowded.append(f"{path.relative_to(ROOT)}:{child.lineno}")
            if comprehension:
                lines.add(child.lineno)
            visit(child, path, inside or comprehension, lines)

    for folder in ("src", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            visit(ast.parse(path.read_text()), path, False, set())
    assert crowded == []
