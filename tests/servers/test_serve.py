"""The page of `pagealloc serve` in a browser.

``PAGEALLOC_DOCS_IMAGES=1 tox -e servers -- -k picture_of_the_page`` writes the picture of
docs/top.md, of a minute of load.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import complaints, open_browser, requested
from processes import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
WRITES_IMAGES = os.environ.get("PAGEALLOC_DOCS_IMAGES") == "1"
IMAGE = ROOT / "docs/images/serve.png"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page of a process under load."""
    command = [sys.executable, str(ROOT / "tests/support/observed.py"), "0"]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("runtime"))}
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        yield url
        process.stdin.close()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def browser(url):
    with open_browser(1280, 1900) as browser:
        browser.get(url)
        wait_for(lambda: has_rates(browser))
        yield browser


def cards(browser):
    """Return what the cards at the top say, by their label."""
    return browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('#cards > .card')].map("
        "card => [card.querySelector('.label').textContent,"
        " card.querySelector('.value').textContent]))"
    )


def has_rates(browser):
    """Whether two readings are shown: one has no rates."""
    return cards(browser).get("Allocations", "").endswith("/s")


def test_it_shows_numbers_that_change(browser):
    found = cards(browser)
    assert set(found) == {"Resident", "Page faults", "Allocations", "P99", "Held", "KV held"}
    assert found["Allocations"].endswith("/s")
    assert found["Held"].endswith("MiB")
    wait_for(lambda: cards(browser)["Allocations"] != found["Allocations"])
    assert browser.find_element("id", "state").get_attribute("class") == "dim"
    assert browser.title.startswith("pagealloc · process ")


def test_all_of_the_process_is_there(browser):
    text = browser.find_element("tag name", "main").text
    for words in (
        "Memory of all allocators",
        "Allocator ",
        "of 256 MiB budget",
        "auto → ",
        "Size classes",
        "KV cache 0",
        "of 192 MiB budget",
        "prefix hit rate",
        "saved by sharing",
        "Latency of allocations",
    ):
        assert words in text
    for chart in ("memory", "latency", "faults", "kv"):
        lines = browser.find_elements("css selector", f"#{chart} svg path[fill=none]")
        assert lines
        assert all("NaN" not in line.get_attribute("d") for line in lines)


def test_a_chart_says_what_is_under_the_pointer(browser):
    from selenium.webdriver import ActionChains

    wait_for(lambda: browser.find_elements("css selector", "#memory svg path[d*=L]"))
    ActionChains(browser).move_to_element(
        browser.find_element("css selector", "#memory svg")
    ).perform()
    wait_for(lambda: "s ago" in browser.find_element("css selector", "#memory .legend").text)
    assert browser.find_elements("css selector", "#memory svg circle")
    ActionChains(browser).move_to_element(browser.find_element("id", "process")).perform()
    wait_for(lambda: not browser.find_elements("css selector", "#memory svg circle"))


def test_nothing_is_asked_of_anybody_else(browser, url):
    addresses = {address for address in requested(browser) if not address.startswith("data:")}
    assert addresses == {f"{url}/", f"{url}/live.json"}


def test_the_policy_is_in_force(browser):
    """A script or style that somebody slips in does nothing, and nothing is fetched elsewhere."""
    done = browser.execute_async_script(
        """
        const done = arguments[0];
        const script = document.createElement("script");
        script.textContent = "window.slippedIn = true";
        document.body.append(script);
        const style = document.createElement("style");
        style.textContent = "main { display: none }";
        document.body.append(style);
        const display = getComputedStyle(document.querySelector("main")).display;
        const slippedIn = window.slippedIn === true;
        fetch("http://localhost:1/").then(() => "fetched", () => "refused")
          .then(fetched => done({slippedIn, display, fetched}));
        """
    )
    assert done["slippedIn"] is False
    assert done["display"] == "block"
    assert done["fetched"] == "refused"
    messages = complaints(browser)
    assert sum("Content Security Policy" in message for message in messages) == len(messages) >= 3


def test_no_error_in_either_colour(url):
    """In a browser that nobody has slipped anything into."""
    for dark in (False, True):
        with open_browser(1280, 1900, dark=dark) as browser:
            browser.get(url)
            wait_for(lambda: has_rates(browser))
            assert complaints(browser) == []
            background = browser.execute_script(
                "return getComputedStyle(document.body).backgroundColor"
            )
            shades = [int(shade) for shade in background.strip("rgb()").split(",")]
            assert (max(shades) < 100) == dark


def test_it_fits_a_small_screen(url):
    with open_browser(500, 900) as browser:
        browser.get(url)
        wait_for(lambda: has_rates(browser))
        assert browser.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )


@pytest.mark.skipif(not WRITES_IMAGES, reason="writes a picture: PAGEALLOC_DOCS_IMAGES=1")
def test_the_picture_of_the_page(url):
    with open_browser(1280, 1200) as browser:
        browser.get(url)
        time.sleep(62)
        height = browser.execute_script("return document.documentElement.scrollHeight")
        frame = 1200 - browser.execute_script("return window.innerHeight")
        browser.set_window_size(1280, height + frame)
        IMAGE.parent.mkdir(exist_ok=True)
        assert browser.save_screenshot(str(IMAGE))
