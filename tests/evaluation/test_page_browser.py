"""The page of a run in Chromium: its divider, sliders and curves work, and a served page is renewed without a reload.

Skipped where Playwright or a Chromium is missing.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.finished_run import EVIL, add_epoch, finished_run, served, started_run

from dag.evaluation.page.document import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
PROMPTS = ["a cat", "a dog", "a fox", "a cow", "a bird", "a bear", "a lion", EVIL]
PICTURES_ARE_THERE = "[...document.images].every((one) => one.complete && one.naturalWidth === 196)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of a desktop's or a phone's width. Fails at the end if the browser has reported an error."""
    context = browser.new_context(viewport={"width": request.param, "height": 844})
    opened, errors = context.new_page(), []

    def dismiss(dialog: Any) -> None:
        errors.append(dialog.message)
        dialog.dismiss()

    opened.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("dialog", dismiss)
    yield opened
    context.close()
    assert errors == []


def until(page: Any, condition: str) -> None:
    """Wait ten seconds for a condition. Playwright's own waiting evaluates text in the page, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def is_as_wide_as_the_window(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_file_in_a_browser(page: Any, tmp_path: Path) -> None:
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    written = write_page(finished_run(tmp_path / "run", PROMPTS))
    page.goto(written.as_uri())
    until(page, PICTURES_ARE_THERE)
    assert [url for url in fetched if not url.startswith(("blob:", "data:"))] == [written.as_uri()]
    assert is_as_wide_as_the_window(page)
    assert page.locator("#compare-strips .strip").count() == 6
    page.get_by_role("button", name="All 8 prompts").first.click()
    assert page.locator("#compare-strips .strip").count() == 8
    assert page.locator("#epoch-strips img").nth(7).get_attribute("alt") == f"{EVIL}, after epoch 2"
    page.get_by_role("button", name="Larger pictures").first.click()
    assert is_as_wide_as_the_window(page)


def test_the_divider_moves_by_pointer_and_keys(page: Any, tmp_path: Path) -> None:
    page.goto(write_page(finished_run(tmp_path / "run", PROMPTS)).as_uri())
    strip, slider = page.locator("#compare-strips .strip").nth(1), page.get_by_label("Divider between before and after")
    strip.scroll_into_view_if_needed()
    box = strip.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 20, steps=4)
    page.mouse.up()
    assert float(slider.input_value()) == 25
    hidden = page.locator("#compare-strips .after").first.evaluate("(one) => getComputedStyle(one).clipPath")
    assert hidden.replace("0px", "0") == "inset(0 0 0 25%)"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert float(slider.input_value()) == 26


def test_the_slider_goes_through_the_epochs(page: Any, tmp_path: Path) -> None:
    page.goto(write_page(finished_run(tmp_path / "run", PROMPTS)).as_uri())
    slider, shown = page.locator("#epoch"), page.locator("#epoch-strips img").first
    assert page.locator("#epoch-label").inner_text() == "epoch 2: reward 3"
    last = shown.get_attribute("src")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#epoch-label").inner_text() == "epoch 0: reward 1"
    assert slider.get_attribute("aria-valuetext") == "epoch 0: reward 1"
    assert shown.get_attribute("src") != last and shown.get_attribute("alt") == "a cat, after epoch 0"


def test_curves_by_pointer_and_keys(page: Any, tmp_path: Path) -> None:
    page.goto(write_page(finished_run(tmp_path / "run", PROMPTS)).as_uri())
    figure = page.locator("#charts figure").first
    drawing, legend = figure.locator("svg"), figure.locator(".legend")
    assert "last" in legend.inner_text()
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 100)
    assert " ".join(legend.inner_text().split()) == "epoch 0 rollouts (mean, 1 sd) – fixed evaluation 1"
    page.mouse.move(0, 0)
    drawing.focus()
    page.keyboard.press("ArrowLeft")
    assert " ".join(legend.inner_text().split()) == "epoch 1 rollouts (mean, 1 sd) 2.5 fixed evaluation 2"
    assert drawing.get_attribute("aria-valuetext") == "epoch 1: rollouts (mean, 1 sd) 2.5, fixed evaluation 2"


def test_a_served_page_is_renewed_without_a_reload(page: Any, tmp_path: Path) -> None:
    run = started_run(tmp_path / "run", PROMPTS, epochs=3)
    add_epoch(run, 0, len(PROMPTS))
    with run.held(), served(run) as address:
        page.goto(address)
        page.evaluate("window.isSame = true")
        assert page.locator("#compare").is_hidden() and "running" in page.locator(".status").inner_text()
        for epoch in (1, 2):
            add_epoch(run, epoch, len(PROMPTS))
        until(page, "document.getElementById('epoch-label').textContent === 'epoch 2: reward 3'")
        until(page, PICTURES_ARE_THERE)
        drawing = page.locator("#charts svg").first
        drawing.focus()
        page.keyboard.press("Home")
        page.locator("#epoch").fill("1")
        add_epoch(run, 3, len(PROMPTS))
        until(page, "document.querySelector('.status').textContent === 'done'")
        assert page.locator("#epoch-label").inner_text() == "epoch 1: reward 2", (
            "the slider stays where a person put it"
        )
        assert page.locator("#epoch").get_attribute("max") == "3"
        assert drawing.get_attribute("aria-valuemax") == "3"
        assert page.evaluate("window.isSame") is True
        page.goto("about:blank")
