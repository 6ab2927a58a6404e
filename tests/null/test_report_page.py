"""Report pages in a browser, narrow and wide, and what their pictures show of long names and of runs of one step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tandem.report import plots
from tandem.report.compare import compare, write_page
from tandem.report.html import write_report
from tandem.report.scaling import fits_of
from tandem.report.scaling_page import flop_of, scaling_figure, write_fits
from tandem.run.ledger import PHASES, Ledger
from tests.browser import PROGRAM, Browser
from tests.courses import Noise
from tests.null.test_advice import FAULTS

NAME = "smollm2_with_a_name_that_no_narrow_window_has_room_for_in_one_line"
LOADED = "location.protocol == 'file:' && document.readyState == 'complete' ? 'yes' : ''"
BEYOND = """[...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll, .plot, svg')
    && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one config, with advisories and a curve that bends."""
    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("run") / NAME
        folder.mkdir()
        rows = []
        for row in Noise(seed).run(60):
            FAULTS["tool_errors"](row)
            rows.append(
                row | {"reward": 0.1 + 0.7 / (1 + math.exp((20 - row["step"]) / 5)), "time_s": 9.0 * row["step"]}
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.json").write_text(json.dumps({"name": NAME, "seed": seed, "model": {"source": "/m" * 90}}))
        ledger = Ledger()
        ledger.lose("zero_advantage", 1_234_567)
        for worker in ("main", "rollouts"):
            ledger.spend(dict.fromkeys(PHASES, 1234.5), worker)
        closed = ledger.close(dict.fromkeys(("main", "rollouts"), 1234.5 * len(PHASES)))
        (folder / "ledger.json").write_text(json.dumps(closed))
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def pages(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, and a comparison."""
    place = tmp_path_factory.mktemp("pages")
    one, both = (write_fits(compare(some), place / "a.png", flop_of).section for some in (folders[:1], folders))
    write_page(compare(folders), place / "both.html", both)
    return {
        "one": write_report(folders[0], ["- learner.lr = 1e-05", f"+ name = {NAME}"], one),
        "both": place / "both.html",
    }


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    browser = Browser(tmp_path)
    yield browser
    browser.close()


def test_nothing_is_wider_than_the_window(browser: Browser, pages: dict[str, Path]) -> None:
    """A long name that makes a narrow page scroll sideways; a picture so small there that nobody reads its words."""
    for path in pages.values():
        for width in (380, 820, 1280):
            browser.look(width, 800, dark=width == 820)
            browser.open(path, ready=LOADED)
            assert browser.run("document.documentElement.scrollWidth") <= width, (path, width)
            assert browser.run(BEYOND) == [], (path, width)
            shown = "[...document.querySelectorAll('.plot img')].map((one) => one.width / one.naturalWidth)"
            assert min(browser.run(shown)) > 0.39, (path, width)  # of two pixels of a picture, one of the screen
    assert browser.errors == [] and all(
        address.startswith(("file:", "data:", "about:")) for address in browser.requests
    )


def test_a_legend_fits_its_picture(folders: list[Path]) -> None:
    """The end of a legend with a long name outside of the picture of cost and quality."""
    figure = scaling_figure(fits_of(compare(folders[:1]), flop_of))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()


def test_a_run_of_one_step_is_seen(folders: list[Path]) -> None:
    """Empty pictures, over steps such as -0.04, in the report of `tandem rollout` and of a run's first step."""
    row = json.loads((folders[0] / "metrics.jsonl").read_text().splitlines()[0]) | {"step": 0}
    for name, figure in plots.FIGURES.items():
        drawn = []
        plots.png(lambda figure=figure, drawn=drawn: drawn.append(figure([row])) or drawn[0])  # type: ignore[misc]
        for axes in drawn[0].axes if plots.shows(drawn[0]) else []:
            assert axes.get_xlim() == (-1.0, 1.0), name
            lines = [line for line in axes.get_lines() if len(line.get_xdata())]
            assert all(line.get_marker() not in ("None", None, "") for line in lines), name


def test_a_dark_picture_has_the_layout_that_it_has_alone(folders: list[Path]) -> None:
    """The dark picture of a page, which takes the light one's layout, is not what it is when it finds its own."""
    rows = compare(folders[:1]).rows[0]
    for draw in (
        partial(plots.reward_figure, rows),
        partial(scaling_figure, fits_of(compare(folders), flop_of)),
    ):
        assert plots.both(draw) == (plots.png(draw), plots.png(draw, dark=True))
