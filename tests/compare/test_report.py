"""The report in a real browser: everything is there, and nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from digrap_scale.cli import main
from digrap_scale.compare.grid import Trial
from tests.compare.grids import grid_of, made_up, write_grid
from tests.compare.test_compare import Use, numbers

__all__ = ["made_up"]  # a fixture
PICTURES = {"id_ood", "rates", "sensitivity", "strength", "conflicts", "drift"}


@pytest.fixture
def report(tmp_path: Path, made_up: Use) -> Path:
    def of_three(trial: Trial) -> Sequence[Sequence[int]]:
        if trial.method.startswith("a"):
            return [[500, 400, 300, 200]]
        rows = [list(numbers(trial)[0])]
        return rows + [[100, 200, 400, 400], rows[0]] if trial.method == "FT" else rows

    made_up(of_three, fails=lambda trial: ("method.strength_lr", 0.01) in trial.setting, pictures=True)
    grid = grid_of(tmp_path, wise_ft={"of": "FT", "alphas": [0.0, 1.0]})
    grid["methods"]["a <b> & c"] = {"method": {"name": "l2sp", "weight": 0.1}, "search": {"method.weight": [0.1, 1.0]}}
    assert main(["compare", write_grid(tmp_path, grid)]) == 1
    return tmp_path / "out" / "report.html"


def browser_path() -> str | None:
    """Chromium of the system; None: playwright's own, if it has been installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'digrap-scale[browser]'"
    )
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(
                f"no browser: apt-get install chromium, or playwright install chromium ({str(error).splitlines()[0]})"
            )
        yield browser.new_page()
        browser.close()


def test_a_browser_shows_all_of_it(report: Path, page: Any) -> None:
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()] and complaints == []
    rows = page.locator("table:not(.search):not(.cost) tbody tr")
    assert rows.locator("td:first-child").all_inner_texts() == ["zero-shot", "FT", "WiSE-FT", "DiGraP", "a <b> & c"]
    heads = ["method", "seeds", "test", "sketch", "photo", "near mean", "far mean", "OOD mean"]
    assert page.locator("table:not(.search):not(.cost) thead th").all_inner_texts() == heads
    digrap = rows.nth(3)
    assert digrap.locator("strong").all_inner_texts()[0] == "54.0 ± 0.6" and digrap.is_visible()
    assert digrap.locator("td").nth(2).locator("small").inner_text() == "+2.0 [+1.8, +2.2]"
    assert (
        "2 failed" in page.locator(".failed").inner_text()
        and "made up" in page.locator(".failed li").first.inner_text()
    )
    shown = page.evaluate("[...document.images].map(i => [i.closest('figure').id, i.complete && i.naturalWidth])")
    assert {name for name, _ in shown} == PICTURES and all(width > 300 for _, width in shown)
    assert "budget: at most 4 settings a method" in page.locator("body").inner_text()
    assert page.locator("table.cost tbody tr").all_inner_texts()[1].split("\t")[:3] == ["DiGraP", "1000", "1.14"]
    page.locator("summary").click()
    searched = page.locator("table.search tbody tr").all_inner_texts()
    # Two rates of FT, two of DiGraP (the other μ failed) and four of the third method.
    assert len(searched) == 8 and searched[0] == "all\tFT\tlearning_rate 0.001\t50.0"
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400  # a wide table scrolls in its own box


def test_the_file_names_no_other(report: Path) -> None:
    text = report.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text) and "@import" not in text and "<script" not in text
    assert "a &lt;b&gt; &amp; c" in text and "a <b>" not in text
