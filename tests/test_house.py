"""How the code is laid out: its lines, files and functions are short."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


class TestAir:
    """Lines of at most 100 columns, files of at most 400 lines, functions of at most 70."""

    FOLDERS = ("src", "tests", "tests_lmms", "tests_openvino", "tests_vllm", "examples")
    FURTHER = ("experiments", "docs")
    LIMITED = ("src", "tests", "tests_lmms", "tests_openvino", "tests_vllm")

    def python_files(self) -> list[Path]:
        folders = [ROOT / folder for folder in self.FOLDERS + self.FURTHER]
        paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
        return [path for path in paths if "node_modules" not in path.parts]

    def test_no_line_is_over_100_columns(self) -> None:
        wide = []
        for path in self.python_files():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if len(line) > 100:
                    wide.append(f"{path.relative_to(ROOT)}:{number}")
        assert wide == []

    def test_no_file_of_library_and_tests_is_over_400_lines(self) -> None:
        lengths = {
            str(path.relative_to(ROOT)): len(path.read_text().splitlines())
            for folder in self.LIMITED
            for path in (ROOT / folder).rglob("*.py")
        }
        assert {path: length for path, length in lengths.items() if length > 400} == {}

    def test_no_function_of_the_library_is_over_70_lines(self) -> None:
        """From `def` to its end, without docstring and blank lines."""
        long = []
        for path in (ROOT / "src").rglob("*.py"):
            lines = path.read_text().splitlines()
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    docstring = ast.get_docstring(node, clean=False) or ""
                    body = text.replace(docstring, "", 1)
                    if sum(bool(line.strip()) for line in body.splitlines()) > 71:
                        long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
        assert long == []
