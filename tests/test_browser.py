"""The report in a real browser, at the width of a phone and of a desk (`make report-check`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nablagfn.report import build, compare
from tests.browser import CHROMIUM, Browser
from tests.made_run import HOSTILE, make

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("NABLAGFN_BROWSER"),
    reason="no Chromium: `apt-get install chromium`, then `make report-check`",
)
WIDTHS = (360, 1280)
SHOWN = "document.querySelector('.slider li.shown')"
OUTPUT = "document.querySelector('.slider output').textContent"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make(folder / f"run_with_a_rather_long_name_{i}_seed0") for i in range(2)]
    return {"one": build(runs[0]), "several": compare(runs, folder / "comparison.html")}


@pytest.mark.parametrize("page", ["one", "several"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_error_no_request_no_horizontal_scroll(
    pages: dict[str, Path], page: str, width: int
) -> None:
    with Browser() as browser:
        browser.open(pages[page], width)
        browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        assert browser.evaluate("document.querySelectorAll('svg text').length") > 5
    assert browser.errors == [] and browser.requests == []


def test_the_slider_moves_by_the_arrow_keys(pages: dict[str, Path]) -> None:
    with Browser() as browser:
        browser.open(pages["one"], 1280)
        visible = "[...document.querySelectorAll('.slider li')].map(e => e.offsetHeight > 0)"
        assert browser.evaluate(visible) == [False, False, True]
        assert browser.evaluate(OUTPUT) == "epoch 4, update 4"
        for _ in range(30):  # by the keyboard alone
            if browser.evaluate("document.activeElement.id") == "when":
                break
            browser.press("Tab")
        for key, where, label in (
            ("ArrowLeft", 1, "epoch 2, update 2"),
            ("ArrowLeft", 0, "the pretrained model"),
            ("ArrowLeft", 0, "the pretrained model"),
            ("End", 2, "epoch 4, update 4"),
            ("Home", 0, "the pretrained model"),
            ("ArrowRight", 1, "epoch 2, update 2"),
        ):
            browser.press(key)
            assert browser.evaluate(visible) == [i == where for i in range(3)]
            assert browser.evaluate(OUTPUT) == label
            said = browser.evaluate("document.activeElement.getAttribute('aria-valuetext')")
            assert said == label
    assert browser.errors == []


def test_a_hostile_prompt_is_text(pages: dict[str, Path]) -> None:
    with Browser() as browser:
        browser.open(pages["one"], 1280)
        rows = "[...document.querySelectorAll('#prompts tbody th')].map(e => e.textContent)"
        assert browser.evaluate(rows) == ["a cat", HOSTILE]
        assert browser.evaluate("document.scripts.length") == 1
        browser.evaluate(  # were it not escaped, the page's policy would still stop it
            "{ const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
            " document.body.append(s) }"
        )
        assert browser.evaluate("window.hit === undefined")
    assert any("Content Security Policy" in error for error in browser.errors)


def test_without_scripts_the_frames_are_a_list(pages: dict[str, Path]) -> None:
    with Browser() as browser:
        browser.open(pages["one"], 360, scripts=False)
        browser.send("DOM.getDocument")
        root = browser.send("DOM.getDocument", depth=1)["root"]["nodeId"]
        frames = browser.send("DOM.querySelectorAll", nodeId=root, selector=".slider li")
        boxes = [browser.send("DOM.getBoxModel", nodeId=n)["model"] for n in frames["nodeIds"]]
        assert len(boxes) == 3 and all(box["height"] > 20 for box in boxes)
        (control,) = browser.send("DOM.querySelectorAll", nodeId=root, selector=".slider .control")[
            "nodeIds"
        ]
        with pytest.raises(AssertionError, match="box model"):  # it is not laid out
            browser.send("DOM.getBoxModel", nodeId=control)
    assert browser.errors == []
