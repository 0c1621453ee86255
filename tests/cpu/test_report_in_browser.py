"""The report as a reader sees it: headless Chromium lays it out and draws it."""

import re

import numpy as np
import pytest
from matplotlib import image

from aifactory_train.results.report import write_report
from browser import browse, needs_chromium
from results_run import a_run

pytestmark = needs_chromium


@pytest.fixture
def page(tmp_path):
    return write_report(a_run(tmp_path / "run", [1, *range(10, 250, 10)], resumed_from=100))


def test_the_page_holds_its_curves_and_no_link_to_the_outside(page, tmp_path):
    dom = browse(tmp_path, page, "--dump-dom")
    titles = re.findall(r"<h3>(.*?)</h3>", dom)
    assert titles[:5] == ["Loss", "Throughput", "Step time", "Memory peak", "Gradient norm"]
    curves = [len(c.split()) for c in re.findall(r'<polyline class="curve[^>]*points="([^"]*)"', dom)]
    assert curves == [24] * 5, "25 lines, of which the resume from step 100 put that of step 110 aside"
    assert "unigram entropy of the corpus" in dom and "attempt 2" in dom
    assert not re.search(r"https?:|\b(?:src|href)=", dom)


@pytest.mark.parametrize(("width", "height"), [(1200, 2600), (500, 4000)])
def test_the_page_is_drawn_and_not_blank(page, tmp_path, width, height):
    shot = tmp_path / "shot.png"
    browse(tmp_path, page, f"--screenshot={shot}", f"--window-size={width},{height}")
    pixels = image.imread(shot)[:, :, :3]
    assert pixels.shape[:2] == (height, width)
    colours, counts = np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) > 60, "text and curves leave many shades"
    assert counts.max() < 0.98 * counts.sum(), "a page of one colour shows nothing"
    curve = np.abs(pixels * 255 - (0x1C, 0x5D, 0x99)).max(axis=2) < 6
    assert curve.sum() > 500, "the curves are drawn in their colour"
