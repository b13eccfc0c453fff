"""The page: complete, well-formed, self-contained, escaped, and small whatever it shows."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from tests.report.pages import LEAN, NAMES, Page, gallery, picture, rows, write

from tprl.evaluation.analysis import Paired
from tprl.evaluation.pictures import GalleryItem, Panel
from tprl.evaluation.results import Row
from tprl.report.evaluation import write_report
from tprl.report.page import TableEntry, page_table


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report") / "report.html")


def test_tags_balance_and_ids_are_unique(text: str) -> None:
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = {f"#{i}" for i in ids}
    assert all(
        (href in known)
        for tag in page.all("use")
        for key, href in tag.items()
        if key.endswith("href")
    )
    assert set(re.findall(r"url\((#[^)]+)\)", text)) <= known


def test_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:", "#"))
    assert "@import" not in text
    assert "url(http" not in text


def test_values_are_escaped(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "Is the &lt;b&gt;red&lt;/b&gt; square left of the &#34;big&#34; circle?" in text
    assert "a &lt;red&gt; square" in text
    assert "<new>" not in text


def test_structure(text: str) -> None:
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(image["alt"] for image in page.all("img"))
    assert all(plot["aria-label"] for plot in page.all("svg"))
    assert [word for tag, word in page.words if tag == "h2"] == [
        "Accuracy against compute",
        "Accuracy by keep ratio",
        "What was kept",
        "Is it language guided?",
        "By kind of question",
        "Paired differences",
        "How many tokens each question gets",
        "Training",
        "How this was made",
    ]
    assert [link["href"] for link in page.all("a")] == [
        "#content",
        *(f"#{section['id']}" for section in page.all("section")),
    ]
    assert "2 per multiply-accumulate" in text


def part(text: str, heading: str) -> str:
    """The section under that heading."""
    return text[text.index(f">{heading}</h2>") :].partition("</section>")[0]


def test_bold_is_the_best_rival(text: str) -> None:
    """At 1/9 the unknown pruner is best: 95.3 - (8/9)^2 * (50 - 31.5) = 80.7; the oracle and all
    tokens stay plain."""
    table = part(text, "Accuracy by keep ratio").partition("<table>")[2]
    assert len(re.findall("<strong>", table)) == 4
    assert "<strong>80.7</strong><small>77.7 to 83.5</small></td>" in table
    assert "11.1 %<small>21 tokens</small><small>FLOPs</small><small>× 0.38-0.40</small>" in table
    assert "<strong>93.3" not in table


def test_retained_is_a_share_of_the_accuracy_with_all_tokens(text: str) -> None:
    """80.7 / 95.3 = 84.7 % for the best rival at 1/9; the oracle's 93.3 are 97.9 %, and not
    bold."""
    lines = part(text, "Accuracy by keep ratio")
    assert "With all 192 visual tokens: 95.3 % (92.3 to 98.1)." in lines
    table = lines[lines.index('<table class="shaded">') :].partition("</table>")[0]
    assert '<td style="--lost: 15"><strong>84.7</strong></td>' in table
    assert '<td style="--lost: 2">97.9</td>' in table
    assert "keep_all" not in table


def test_a_failure_says_so(tmp_path: Path) -> None:
    def item(right: bool | None, full: bool | None) -> GalleryItem:
        return GalleryItem(picture(0), "?", "2", "2", [Panel("tprl", None, "1", right)], full)

    cases = [(False, True), (False, False), (False, None), (True, False), (None, True)]
    lean = LEAN | {"gallery": [item(*case) for case in cases]}
    text = write(tmp_path / "report.html", **lean)
    badges = re.findall(r'<p class="badge">(.*?)</p>', text)
    wrong = "Failure: tprl is wrong"
    assert badges == [f"{wrong}, all tokens are right", f"{wrong}, and so are all tokens", wrong]
    assert '“1” <span aria-hidden="true">✗</span><span class="hidden">(wrong)</span>' in text


def test_where_the_numbers_are_from(tmp_path: Path) -> None:
    facts = {"questions": 150, "date": "today", "hardware": "an <abacus>"}
    text = write(tmp_path / "report.html", facts=facts, **LEAN)
    assert '<p class="note">150 questions · date today</p>' in text
    lines = part(text, "How this was made")
    assert "<dt>hardware</dt><dd>an &lt;abacus&gt;</dd>" in lines
    assert "python -m src.train stage=all" in lines


def test_every_plot_is_drawn_once(text: str) -> None:
    counts = {"Accuracy against compute": 1, "Training": 2, "How many tokens each question gets": 3}
    for heading, count in counts.items():
        assert part(text, heading).count('<div class="plot"><svg') == count


def test_paired_bold_only_where_the_interval_excludes_zero(text: str) -> None:
    table = part(text, "Paired differences")
    assert "<strong>+3.0</strong><small>+1.0 to +5.0, p 0.002</small>" in table
    assert "<td>+0.0<small>-2.0 to +2.0, p 0.200</small></td>" in table


def test_a_difference_of_nothing_has_no_interval(tmp_path: Path) -> None:
    result = [
        Paired("tprl", "random", 1 / 9, 0.0, 0.0, 0.0, 1.0),
        Paired("tprl", "mlp", 1 / 9, 0.0, -0.1, 0.1, 1.0),
    ]
    table = part(write(tmp_path / "report.html", paired=result, **LEAN), "Paired differences")
    assert table.count("<td><em>level</em></td>") == 1
    assert "+0.0<small>-10.0 to +10.0, p 1.000</small>" in table
    assert "Level: the same score on every image" in table


def test_names_lie_on_the_page_and_not_under_a_line(text: str) -> None:
    plot = part(text, "Accuracy against compute")
    assert plot.count("fill: var(--page)") == len(NAMES) + 2
    assert "523 questions" in part(text, "Is it language guided?")


def test_a_number_and_its_percent_sign_stay_together(text: str) -> None:
    assert "TPRL keeps 87.3\N{NO-BREAK SPACE}% accuracy" in text


def test_the_hint_goes_by_what_the_entries_hold() -> None:
    def hinted(columns: int, entry: TableEntry) -> bool:
        return page_table("c", ["11.1 %"] * columns, ["tprl"], lambda name, i: entry).scrolls

    wide = TableEntry("+3.0", ("+12.3 to +14.5, p < 0.001",))
    assert hinted(2, wide)
    assert not hinted(1, wide)
    assert not hinted(4, TableEntry("87.3", bold=True))


def test_both_color_schemes_define_every_color(text: str) -> None:
    style = text[text.index("<style>") : text.index("</style>")]
    schemes = re.findall(
        r"(@media screen and \(prefers-color-scheme: dark\) \{\s*)?:root \{(.*?)\}",
        style,
        re.DOTALL,
    )
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text))
    assert len(used) > 15
    for dark in (False, True):
        declared = " ".join(body for media, body in schemes if bool(media) == dark)
        assert used <= set(re.findall(r"(--[a-z0-9]+):", declared))
    assert "#fe0" not in text


def test_many_pictures_stay_below_three_megabytes(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", **LEAN | {"gallery": gallery(16, panels=6)})
    assert 1_000_000 < len(text.encode()) < 3_000_000


def test_sections_without_material_are_left_out(tmp_path: Path) -> None:
    empty = {**LEAN, "paired": [], "commands": [], "config_yaml": ""}
    accuracy = [row for row in rows() if row.metric == "accuracy"]
    page = Page(write(tmp_path / "report.html", rows=accuracy, **empty))
    assert [word for tag, word in page.words if tag == "h2"] == [
        "Accuracy against compute",
        "Accuracy by keep ratio",
    ]


def test_the_same_report_twice_is_the_same_file(tmp_path: Path, text: str) -> None:
    assert write(tmp_path / "again.html") == text


def test_the_model_alone_makes_a_report(tmp_path: Path) -> None:
    full = [row for row in rows() if row.pruner == "keep_all"]
    page = write(tmp_path / "report.html", rows=full, **LEAN)
    assert "With all 192 visual tokens: 95.3 %" in page
    Page(page)  # well-formed


def test_the_numbers_of_a_benchmark_are_in_their_own_unit(tmp_path: Path) -> None:
    def row(metric: str, value: float) -> Row:
        return Row(
            "m", "mme", "tprl", 0, 1 / 3, 64.0, metric, value, value - 1, value + 1, 1.0, 0.5
        )

    rows = [
        row("accuracy", 0.5),
        row("mme/perception", 1511.3),
        row("mme/score/OCR", 140.0),
        row("accuracy/OCR", 0.25),
    ]
    path = tmp_path / "report.html"
    write_report(path, title="t", headline="h", rows=rows, protocol="MME's own rule")
    words = [text for _, text in Page(path.read_text()).words]
    assert "As the benchmark counts" in words
    assert "MME's own rule." in words
    assert "1511.3" in words
    assert "25.0" in words
    assert not {"140.0", "score/OCR", "mme/score/OCR"} & set(words)
