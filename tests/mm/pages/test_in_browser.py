"""Pages in a real browser: what is drawn, at the width of a phone and of a desk, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mm.pages.compare_page import compare_page
from mm.pages.plan_page import plan_page
from mm.pages.run_page import write_report
from tests.mm.pages.browser import browser
from tests.mm.pages.compared import comparison
from tests.mm.pages.test_plan_page import report
from tests.mm.pages.test_run_page import EVIL, write_run

pytestmark = pytest.mark.slow

LOOKS = (Path(__file__).parent / "looks.js").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    write_run(folder / "run", 450)
    write_run(folder / "evil", 5, EVIL)
    out = {"run": write_report(folder / "run"), "evil": write_report(folder / "evil")}
    for name, title in (("comparison", "disjoint"), ("evil comparison", EVIL)):
        out[name] = folder / f"{name}.html"
        out[name].write_text(compare_page(comparison(title)), encoding="utf-8")
    for name, title in (("plan", "mixed"), ("evil plan", EVIL)):
        out[name] = folder / f"{name}.html"
        out[name].write_text(plan_page(report(title)), encoding="utf-8")
    return out


@pytest.fixture
def running(request: pytest.FixtureRequest, processes: None) -> Iterator[Any]:
    with browser(request.config.getoption("--browser")) as found:
        yield found


class Opened:
    """A page of a browser. complaints: of its console; requests: for anything but the page itself."""

    def __init__(self, running: Any, path: Path, width: int = 1280, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = running.new_page(viewport={"width": width, "height": 900}, **options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        own = (path.as_uri(), "data:")
        self.requests = [url for url in self.requests if not url.startswith(own)]

    def look(self, function: str) -> list[Any]:
        """What a function of looks.js gives."""
        found: list[Any] = self.page.evaluate(f"(() => {{ {LOOKS}\nreturn {function}(); }})()")
        return found


@pytest.mark.parametrize("name", ["run", "evil", "comparison", "evil comparison", "plan", "evil plan"])
def test_pages_are_drawn_at_any_width_in_light_and_dark(
    name: str, pages: dict[str, Path], running: Any
) -> None:
    grounds = {}
    for width in (360, 1280):
        for scheme in ("light", "dark"):
            opened = Opened(running, pages[name], width, color_scheme=scheme)
            page = opened.page
            assert not opened.complaints and not opened.requests
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert opened.look("outside") == [] and opened.look("empty") == []
            faint = [(text, ratio) for text, ratio in opened.look("contrasts") if ratio < 4.5]
            assert not faint
            assert page.locator("svg[role=img]").count() >= 5
            for section in page.locator("main > section").all():
                assert section.is_visible() and section.bounding_box()["width"] > 300
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.close()
    assert grounds["light"] != grounds["dark"]


def test_the_switch_overrides_the_system(pages: dict[str, Path], running: Any) -> None:
    """Without a script, by keyboard."""
    page = Opened(running, pages["run"], color_scheme="light", java_script_enabled=False).page
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.locator("#theme-system").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#theme-dark").is_checked() and page.evaluate(ground) != before
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(ground) == before


def test_a_table_is_sorted_by_keyboard_alone(pages: dict[str, Path], running: Any) -> None:
    opened = Opened(running, pages["comparison"])
    page = opened.page
    heads = page.locator("#figures th[scope=col]")
    names = lambda: page.locator("#figures tbody th").all_text_contents()[:3]  # noqa: E731
    before = names()
    assert before == ["disjoint 0", "disjoint 1", "disjoint 2"]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "speed-up":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert names() == before[::-1]  # by number: the slowest first
    head = heads.filter(has_text="speed-up")
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert names() == before and head.get_attribute("aria-sort") == "descending"
    assert [h.get_attribute("aria-sort") for h in heads.all()].count("none") == heads.count() - 1
    assert not opened.complaints


def test_values_of_a_chart_can_be_read_by_keys_and_pointer(pages: dict[str, Path], running: Any) -> None:
    opened = Opened(running, pages["run"])
    figure = opened.page.locator("figure[data-chart]").first
    svg, readout = figure.locator("svg.plot").first, figure.locator(".readout")
    svg.focus()
    opened.page.keyboard.press("End")
    assert readout.text_content() == f"step 450: {5 / 450:.4g}"
    opened.page.keyboard.press("ArrowLeft")
    assert readout.text_content().startswith("step 448: ")  # that of the stretch before
    svg.hover(position={"x": 0.56 * svg.bounding_box()["width"], "y": 40})  # the middle of its axis
    assert 215 < int(readout.text_content().split()[1].rstrip(":")) < 235
    assert not opened.complaints


def test_without_scripts_everything_is_there(pages: dict[str, Path], running: Any) -> None:
    page = Opened(running, pages["comparison"], java_script_enabled=False).page
    assert (
        page.locator("#figures th[scope=col]").first.is_visible() and page.locator("th button").count() == 0
    )
    assert page.locator("svg[role=img]").first.is_visible() and page.locator("#timelines svg").count() == 3


def test_screen_readers_find_names_and_landmarks(pages: dict[str, Path], running: Any) -> None:
    page = Opened(running, pages["comparison"]).page
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("region", name="Figures", exact=True).count() == 1
    assert page.get_by_role("img", name="disjoint 0: step 3").count() == 1
    assert page.get_by_role("columnheader", name="speed-up").get_attribute("aria-sort") == "none"
