"""The plots and pictures of a report, apart from its page."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tests.report.pages import write

from tprl.evaluation.pictures import overlap
from tprl.report import figures, rasters


def test_the_frontier_joins_what_no_cheaper_point_equals() -> None:
    points = [(3.0, 0.7), (1.0, 0.5), (2.0, 0.4), (2.5, 0.7), (4.0, 0.9), (1.0, 0.3)]
    assert figures._frontier(points) == [(1.0, 0.5), (2.5, 0.7), (4.0, 0.9)]
    assert figures._frontier([]) == []


def test_long_curves_are_thinned_to_means() -> None:
    thin = figures._thinned([(float(x), float(x % 2)) for x in range(1000)], most=100)
    assert len(thin) == 100
    assert thin[0] == (4.5, 0.5)
    assert figures._thinned([(1.0, 2.0), (3.0, 5.0)]) == [(1.0, 2.0), (3.0, 5.0)]


def test_pruners_differ_in_color_or_marker_however_many() -> None:
    looks = [style[:4] for style in figures.styles([f"new{i}" for i in range(20)]).values()]
    assert len(set(looks)) == len(looks)


def test_pruned_patches_are_dark_and_kept_ones_untouched() -> None:
    image = Image.new("RGB", (60, 40), (200, 180, 160))
    keep = np.zeros((2, 3), dtype=bool)
    keep[0, 2] = True
    pixels = np.asarray(rasters.mask_picture(image, keep, side=60))
    assert pixels.shape == (40, 60, 3)
    assert (pixels[:20, 40:] == (200, 180, 160)).all()
    assert pixels[20:].max() < 70
    assert pixels[:20, :40].max() < 70


def test_overlap() -> None:
    a, b = np.array([[True, True, False, False]]), np.array([[False, True, True, True]])
    assert overlap(a, b) == 0.4
    assert overlap(a, a) == 1
    assert overlap(a, ~a) == 0


def test_the_first_plot_stands_alone(tmp_path: Path) -> None:
    write(tmp_path / "report.html")
    svg = ElementTree.fromstring((tmp_path / "pareto.svg").read_text())
    text = (tmp_path / "pareto.svg").read_text()
    assert svg.tag.endswith("svg")
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text))
    assert used
    assert used <= set(re.findall(r"(--[a-z0-9]+):", text))


def test_labels_are_pushed_apart_no_more_than_needed() -> None:
    assert figures._spread([0.0, 10.0], 1.0) == [0.0, 10.0]
    assert figures._spread([5.0, 5.0], 1.0) == [4.5, 5.5]
    assert figures._spread([1.0, 1.0, 1.0, 9.0], 2.0) == [-1.0, 1.0, 3.0, 9.0]
