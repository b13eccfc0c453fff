"""What docs/howto-dataset.md says works: its code is a benchmark, its rows are data."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_text, encoded, official, picture, write_jsonl

from tprl.data.custom import Custom

TEXT = (Path(__file__).parents[1] / "docs/howto-dataset.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return found


@pytest.fixture
def counting(tmp_path: Path) -> Any:
    """The module of the page, in a file of its own."""
    path = tmp_path / "counting.py"
    path.write_text(block("python"))
    spec = importlib.util.spec_from_file_location("counting", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_is_a_benchmark_in_less_than_sixty_lines(counting: Any, tmp_path: Path) -> None:
    assert len((block("python") + block("yaml")).splitlines()) < 60
    rows = [
        {"image_id": 7, "image": as_text(encoded(7)), "question_id": n, "question": "How many?", "count": count}
        for n, count in enumerate((3, 3, 3, 0))
    ]
    data = counting.Counting(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert data[0].uid == "counting/test/7/0"
    assert data[3].question == "How many?\nAnswer with a number."
    said = ["3 dogs", "There are 4.", "three", "10"]
    assert official(data, said) == pytest.approx({"accuracy": 25, "within_one": 50})


def test_the_yaml_names_the_class(counting: Any) -> None:
    assert block("yaml") == f"_target_: tprl.data.counting.{counting.Counting.__name__}\n"


def test_the_rows_are_data(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(block("json"))
    (tmp_path / "photos").mkdir()
    picture(1, (400, 300)).save(tmp_path / "photos/1.png")
    data = Custom("all", source=str(tmp_path / "data.jsonl"), coordinates="absolute")
    assert (data[0].answers, data[1].box) == (("a cup", "cup"), (120.0, 40.0, 310.0, 260.0))
