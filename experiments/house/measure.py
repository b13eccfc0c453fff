"""How the house is built: rooms, arrows between them, knots, and how dense the code is, for one or
more commits.

    python experiments/house/measure.py 8510d02 27b800e HEAD

Only git and the standard library are needed. What is counted is said in README.md.
"""

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "src/tprl/"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Arrows = dict[tuple[str, str], list[str]]  # (from room, to room) -> imports, "a.b -> c.d"


def library_at(commit: str) -> dict[str, str]:
    """Path below src/tprl -> source text, of every Python file of the library at a commit."""
    command = ["git", "-C", str(ROOT), "archive", commit, LIBRARY]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    sources = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(".py"):
                content = files.extractfile(member)
                assert content is not None
                sources[member.name.removeprefix(LIBRARY)] = content.read().decode()
    return sources


def library_here() -> dict[str, str]:
    """The same of the working tree."""
    folder = ROOT / LIBRARY
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


# --- the graph of imports -------------------------------------------------------------------------


def room_of(module: str) -> str:
    """A folder; a module at the top is a room of its own."""
    return module.partition(".")[0]


def arrows(sources: Mapping[str, str]) -> Arrows:
    """Imports between rooms, those inside functions too. The package's own `__init__` imports
    nothing by itself."""
    modules = {_module(path) for path in sources}
    between: Arrows = {}
    for path, text in sources.items():
        module = _module(path)
        if module == "":
            continue
        for target in _imports(text, modules):
            if room_of(target) != room_of(module):
                between.setdefault((room_of(module), room_of(target)), []).append(
                    f"{module} -> {target}"
                )
    return between


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def _imports(text: str, modules: set[str]) -> Iterator[str]:
    """The modules of the library that a file imports."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and f"{node.module}.".startswith("tprl.")
        ):
            package = node.module.removeprefix("tprl").removeprefix(".")
            for alias in node.names:
                full = f"{package}.{alias.name}".removeprefix(".")
                if full in modules or package:
                    yield full if full in modules else package
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.removeprefix("tprl.") for name in names if name.startswith("tprl."))


def knots(between: Arrows) -> list[list[str]]:
    """Rooms that reach each other: the strongly connected parts of more than one room."""
    rooms = {room for pair in between for room in pair}
    reach = {room: {b for a, b in between if a == room} for room in rooms}
    for middle in rooms:  # Warshall's transitive closure
        for room in rooms:
            if middle in reach[room]:
                reach[room] |= reach[middle]
    parts = {tuple(sorted({room} | {b for b in reach[room] if room in reach[b]})) for room in rooms}
    return [list(part) for part in sorted(parts) if len(part) > 1]


# --- how dense the code is ------------------------------------------------------------------------


def function_lengths(sources: Mapping[str, str]) -> list[int]:
    """Lines of every function from `def` to its end, without its docstring and blank lines."""
    lengths = []
    for text in sources.values():
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            assert node.end_lineno is not None
            body = range(node.lineno, node.end_lineno + 1)
            docstring = range(0)
            if ast.get_docstring(node) is not None:
                assert node.body[0].end_lineno is not None
                docstring = range(node.body[0].lineno, node.body[0].end_lineno + 1)
            lengths.append(
                sum(number not in docstring and bool(lines[number - 1].strip()) for number in body)
            )
    return lengths


def comments(text: str) -> tuple[int, int, int]:
    """Comments, lines of code (neither blank, nor comment, nor docstring), and tokens on them."""
    tree = ast.parse(text)
    strings: set[int] = set()
    for node in ast.walk(tree):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            strings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    count, tokens, code = 0, 0, set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            count += 1
        elif token.type not in skipped and token.start[0] not in strings:
            tokens += 1
            code |= set(range(token.start[0], token.end[0] + 1))
    return count, len(code), tokens


def nested_comprehensions(text: str) -> int:
    """Comprehensions that hold another one, or have two `for`."""
    count = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS):
            inner = any(
                isinstance(child, COMPREHENSIONS) for child in ast.walk(node) if child is not node
            )
            count += inner or len(node.generators) > 1
    return count


def measure(sources: Mapping[str, str]) -> dict[str, str]:
    """Every number of the table, in words."""
    between = arrows(sources)
    modules = [_module(path) for path in sources]
    hall = [
        module for module in modules if module and "." not in module and f"{module}.py" in sources
    ]
    rooms = {path.partition("/")[0] for path in sources if "/" in path}
    lengths = function_lengths(sources)
    lines = [line for text in sources.values() for line in text.splitlines()]
    counted = [comments(text) for text in sources.values()]
    remarks, code, tokens = (sum(column) for column in zip(*counted, strict=True))
    tied = knots(between)
    return {
        "files": str(len(sources)),
        "lines": str(len(lines)),
        "modules at the top": str(len(hall)),
        "rooms": str(len(rooms)),
        "arrows between rooms": str(len(between)),
        "imports across rooms": str(sum(map(len, between.values()))),
        "rooms in a knot": str(sum(map(len, tied)))
        + (f" ({'; '.join(', '.join(knot) for knot in tied)})" if tied else ""),
        "functions": str(len(lengths)),
        "lines of a function, median": f"{statistics.median(lengths):g}",
        "functions of 5 to 40 lines": f"{sum(5 <= n <= 40 for n in lengths) / len(lengths):.1%}",
        "functions over 60 lines": str(sum(length > 60 for length in lengths)),
        "longest file": str(max(len(text.splitlines()) for text in sources.values())),
        "lines over 100 characters": f"{sum(len(line) > 100 for line in lines) / len(lines):.1%}",
        "tokens on a line of code": f"{tokens / code:.1f}",
        "comments per 100 lines of code": f"{100 * remarks / code:.1f}",
        "nested comprehensions": str(sum(map(nested_comprehensions, sources.values()))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs="*", help="default: the working tree")
    commits = parser.parse_args().commits
    columns = {commit: measure(library_at(commit)) for commit in commits} or {
        "here": measure(library_here())
    }
    names = list(next(iter(columns.values())))
    print("| |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for name in names:
        print(f"| {name} |", " | ".join(column[name] for column in columns.values()), "|")


if __name__ == "__main__":
    main()
