"""The bench report as a reader sees it: headless Chromium lays it out and draws it."""

import re

import numpy as np
import pytest
from matplotlib import image

from aifactory_train.bench.record import EnergyWindow
from bench_pages import a_collective, a_gemm, a_step
from bench_pages import page as render
from browser import browse, needs_chromium

pytestmark = needs_chromium


@pytest.fixture
def page(tmp_path):
    window = EnergyWindow(scope="gpu", method="nvml_counter", joules=4000.0, seconds=20.0)
    spiky = [1.0 + i % 7 / 100 for i in range(60)]
    spiky[20] = 3.0
    gemms = [a_gemm(i, f"n{i}", 7e11 if i == 2 else 1e12 + i * 1e9) for i in range(4)]
    steps = [a_step(10 + i, nodes, spiky, 1000 * nodes, energy=[window]) for i, nodes in enumerate((1, 2, 4))]
    wire = {"ceiling_bytes_per_s": 1e11}
    collectives = [a_collective(20 + i, 2**15 << i, 9e10 * 2**i / (2**i + 100), wire) for i in range(16)]
    html = tmp_path / "report.html"
    html.write_text(render(tmp_path / "bench", *gemms, *steps, *collectives))
    return html


def test_every_plot_is_there_and_nothing_sticks_out_of_its_frame(page, tmp_path):
    dom = browse(tmp_path, page, "--dump-dom")
    assert dom.count("<polyline") == 3 * 2 + 1 + 1, "two of each step cell, a collective, a scaling"
    assert dom.count('class="boxes"') == 1 and dom.count('<i class="dot system"') == 3
    places = re.findall(r' (?:points|style)="([^"]*)"', dom)
    numbers = [float(n) for text in places for n in re.findall(r"(?<![\w.#-])-?[\d.]+(?=[,% ]|$)", text)]
    assert len(numbers) > 300 and min(numbers) >= 0 and max(numbers) <= 100
    assert not re.search(r"https?:|\b(?:src|href)=", dom)


@pytest.mark.parametrize(("width", "height"), [(1280, 3600), (500, 6000)])
def test_the_page_is_drawn_in_its_colours(page, tmp_path, width, height):
    shot = tmp_path / "shot.png"
    browse(tmp_path, page, f"--screenshot={shot}", f"--window-size={width},{height}")
    pixels = image.imread(shot)[:, :, :3] * 255
    assert pixels.shape[:2] == (height, width)
    for name, colour in (("lines", (0x1C, 0x5D, 0x99)), ("the outlier", (0xB3, 0x34, 0x2D))):
        drawn = np.abs(pixels - colour).max(axis=2) < 6
        assert drawn.sum() > 100, f"{name} cannot be seen"
