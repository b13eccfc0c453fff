"""Links, paths and rules that documents and comments name exist in the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "experiments").glob("**/README.md"),
]
CODE = [
    p
    for folder in ("src", "tests", "experiments", "conf", "examples")
    for p in (ROOT / folder).rglob("*.[py]*")
]
SOURCES = [
    path for path in CODE if path.suffix in (".py", ".yaml") and "node_modules" not in path.parts
]


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith(("http", "mailto:")):
            continue
        goal = page.parent / path if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append("".join(target))
    assert broken == []


@pytest.mark.parametrize("name", ["baselines.md", "method.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    named = re.findall(r"`((?:tests|src|docs|examples|experiments)/[\w/.]+)", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_comments_name_only_documents_of_the_repository() -> None:
    """A reader of a clone can follow every reference: `docs/<page>.md`, with the heading where one
    is named."""
    lost = []
    for path in SOURCES:
        text = path.read_text()
        lost += [
            f"{path.name}: {name}"
            for name in re.findall(r"\b(?:BASELINES|METHOD|ECOSYSTEM|DESIGN)\b", text)
        ]
        for page, anchor in re.findall(r"\bdocs/([\w-]+\.md)(?:#([\w-]+))?", text):
            goal = ROOT / "docs" / page
            if not goal.exists() or (anchor and anchor not in anchors(goal)):
                lost.append(f"{path.name}: docs/{page}#{anchor}")
    assert [line for line in lost if "test_docs.py" not in line] == []
