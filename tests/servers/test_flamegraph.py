"""Flame graphs in a browser: values, zoom, search, keys, colours that can be read.

``PAGEALLOC_DOCS_IMAGES=1 python -m pytest tests/servers/test_flamegraph.py`` writes the picture of
docs/profiles.md, of tests/support/inference.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import complaints, open_browser, requested

from pagealloc.observe.flamegraph import flame_graph
from pagealloc.observe.profiles import Frame, Profile, ValueType

ROOT = Path(__file__).resolve().parent.parent.parent
WRITES_IMAGES = os.environ.get("PAGEALLOC_DOCS_IMAGES") == "1"
IMAGE = ROOT / "docs/images/flamegraph.png"

SPACE = ValueType("alloc_space", "bytes")
KIB = 1024
MAIN = Frame("main", "/home/a/app.py", 10)
LOAD = Frame("load", "/home/a/app.py", 20)
READ = Frame("read", "/v/lib/python3.12/site-packages/shelf/files.py", 5)
PARSE = Frame("parse", "/v/lib/python3.12/site-packages/grammar/parser.py", 7)


def profile(*samples):
    made = Profile((SPACE,), SPACE, 512 * KIB)
    for stack, value in samples:
        made.add(stack, [value])
    return made


def heap():
    """A profile of main 1,000 KiB: load 750 (read 500, parse 200), read 250."""
    return profile(
        ((READ, LOAD, MAIN), 500 * KIB),
        ((PARSE, LOAD, MAIN), 200 * KIB),
        ((LOAD, MAIN), 50 * KIB),
        ((READ, MAIN), 250 * KIB),
    )


def of_four_values():
    """A profile of 1,000 KiB in main, of which 300 are live, all in read below load."""
    names = ("alloc_objects", "alloc_space", "inuse_objects", "inuse_space")
    types = tuple(ValueType(name, "bytes" if "space" in name else "count") for name in names)
    made = Profile(types, SPACE, 512 * KIB)
    made.add((READ, LOAD, MAIN), [10, 500 * KIB, 6, 300 * KIB])
    made.add((PARSE, LOAD, MAIN), [28, 290 * KIB, 0, 0])
    made.add((READ, MAIN), [2, 210 * KIB, 0, 0])
    return made


def of_many_modules():
    frames = [Frame(f"f{at}", f"/lib/module_{at}.py", at + 1) for at in range(14)]
    return profile(*(((frame, MAIN), (at + 10) * KIB) for at, frame in enumerate(frames)))


class Graph:
    """A page in a browser."""

    def __init__(self, browser, folder, found, **options):
        self.browser = browser
        path = folder / "page.html"
        path.write_text(flame_graph(found, "What load() holds", **options), encoding="utf-8")
        browser.get(path.as_uri())

    def frames(self):
        """Each call that is shown: its label, and the share of the width that it and a gap take."""
        whole, *rows = self.browser.execute_script(
            "const graph = document.getElementById('graph');"
            "return [graph.clientWidth].concat(Array.from(graph.children, (frame) => "
            "[frame.querySelector('span')?.textContent, frame.getBoundingClientRect().width]));"
        )
        return [(name, round((width + 1) / whole, 2)) for name, width in rows]

    def frame(self, n):
        return self.browser.find_elements("css selector", ".frame")[n]

    def classes(self):
        return [each.get_attribute("class") for each in self.find_all(".frame")]

    def find_all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        return self.browser.find_element("css selector", selector).text

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def contrasts(self):
        """The least contrast of a text with what is behind it, by element."""
        rows = self.browser.execute_script(
            "return Array.from(document.querySelectorAll('.frame span, p, h1, h2, td, li span, '"
            "    + 'button'))"
            "  .filter((each) => each.textContent.trim() && each.offsetParent)"
            "  .map((each) => {"
            "    let behind = each;"
            "    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)')"
            "      behind = behind.parentElement;"
            "    return [each.textContent, getComputedStyle(each).color,"
            "      getComputedStyle(behind).backgroundColor];"
            "  });"
        )
        return {(text, *colours): contrast(*colours) for text, *colours in rows}


def luminance(colour):
    """Of a colour such as "rgb(1, 2, 3)", after WCAG 2."""
    channels = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser
        assert complaints(browser) == []
        urls = requested(browser)
        assert urls
        assert {url.partition(":")[0] for url in urls} == {"file"}


@pytest.fixture
def graph(browser, tmp_path):
    return Graph(browser, tmp_path, heap())


WHOLE = [
    ("all", 1.0),
    ("main", 1.0),
    ("load", 0.75),
    ("read", 0.5),
    ("parse", 0.2),
    ("read", 0.25),
]


def test_a_page(graph):
    assert graph.frames() == WHOLE
    assert graph.text("h1") == "What load() holds"
    assert graph.text("header p") == "alloc_space in bytes, 4 stacks, 1,000 KiB in all"
    rows = [row.text for row in graph.find_all("#hottest tr")]
    assert rows == [
        "750 KiB 75.0 % read site-packages/shelf/files.py:5",
        "200 KiB 20.0 % parse site-packages/grammar/parser.py:7",
        "50.0 KiB 5.0 % load home/a/app.py:20",
    ]
    legend = [" ".join(row.text.split()) for row in graph.find_all("#legend li")]
    assert legend == ["shelf 75.0 %", "grammar 20.0 %", "app 5.0 %"]
    assert not graph.find_all("#nothing:not([hidden])")


def test_calls_lie_side_by_side_below_the_one_that_led_to_them(graph):
    _, main, load, read, parse, read_too = (each.rect for each in graph.find_all(".frame"))
    assert main["x"] == load["x"] == read["x"]
    assert load["y"] > main["y"]
    assert read["y"] == parse["y"] > load["y"] == read_too["y"]
    for left, right in ((read, parse), (load, read_too)):
        assert right["x"] == pytest.approx(left["x"] + left["width"] + 1, abs=1)


def test_colours_are_the_modules_own(graph):
    shown = [each.value_of_css_property("background-color") for each in graph.find_all(".frame")]
    _, main, load, read, parse, read_too = shown
    assert main == load
    assert read == read_too
    assert len({main, read, parse}) == 3
    swatches = graph.find_all(".swatch")
    assert [each.value_of_css_property("background-color") for each in swatches] == [
        read,
        parse,
        main,
    ]


def test_a_click_zooms(graph):
    reset = graph.browser.find_element("id", "reset")
    assert not reset.is_enabled()
    graph.frame(2).click()
    zoomed = [("all", 1.0), ("main", 1.0), ("load", 1.0), ("read", 0.67), ("parse", 0.27)]
    assert graph.frames() == zoomed
    assert "load /home/a/app.py:20" in graph.text("#details")
    assert "750 KiB, 75.0 % of all; of its own 50.0 KiB, 5.0 %" in graph.text("#details")
    graph.press("\ue015")  # down, from there
    assert graph.browser.switch_to.active_element.text.split()[0] == "read"
    reset.click()
    assert graph.frames() == WHOLE
    assert not reset.is_enabled()
    graph.frame(2).click()
    graph.frame(1).click()  # out again, by a call above
    assert graph.frames() == WHOLE
    graph.frame(2).click()
    graph.press("\ue00c")  # Escape
    assert graph.frames() == WHOLE


class TestValues:
    @pytest.fixture
    def graph(self, browser, tmp_path):
        return Graph(browser, tmp_path, of_four_values())

    @staticmethod
    def switch(graph, name):
        button, *others = (each for each in graph.find_all("#values button") if each.text == name)
        assert not others
        button.click()
        assert [each.text for each in graph.find_all("#values [aria-pressed=true]")] == [name]

    def test_each_can_be_shown(self, graph):
        names = [button.text for button in graph.find_all("#values button")]
        assert names == ["alloc_objects", "alloc_space", "inuse_objects", "inuse_space"]
        assert [each.text for each in graph.find_all("#values [aria-pressed=true]")] == [names[3]]
        assert graph.frames() == [("all", 1.0), ("main", 1.0), ("load", 1.0), ("read", 1.0)]
        assert graph.text("header p") == "inuse_space in bytes, 1 stack, 300 KiB in all"
        assert len(graph.find_all("#hottest tr")) == len(graph.find_all("#legend li")) == 1
        self.switch(graph, "alloc_objects")
        assert graph.frames()[2:] == [
            ("load", 0.95),
            ("parse", 0.7),
            ("read", 0.25),
            ("read", 0.05),
        ]
        assert graph.text("header p") == "alloc_objects in count, 3 stacks, 40 in all"
        rows = [row.text.split()[:4] for row in graph.find_all("#hottest tr")]
        assert rows == [["28", "70.0", "%", "parse"], ["12", "30.0", "%", "read"]]
        legend = [row.text.split()[0] for row in graph.find_all("#legend li")]
        assert legend == ["grammar", "shelf"]
        assert graph.text("#details").splitlines()[1] == "40, 100.0 % of all; of its own 0, 0.0 %"

    def test_a_module_keeps_its_colour(self, graph):
        def colour():
            return graph.frame(3).value_of_css_property("background-color")

        assert graph.frame(3).text.startswith("read")
        of_read = colour()
        self.switch(graph, "alloc_space")
        assert graph.frame(3).text.startswith("read")
        assert colour() == of_read
        self.switch(graph, "alloc_objects")
        assert graph.frame(3).text.startswith("parse")
        assert colour() != of_read

    def test_zoom_and_search_stay(self, graph):
        self.switch(graph, "alloc_space")
        graph.frame(2).click()
        graph.browser.find_element("id", "search").send_keys("parse")
        zoomed = [("all", 1.0), ("main", 1.0), ("load", 1.0)]
        assert graph.frames() == [*zoomed, ("read", 0.63), ("parse", 0.37)]
        assert graph.text("#matches") == "1 found, 29.0 % of all"
        self.switch(graph, "alloc_objects")
        assert graph.frames() == [*zoomed, ("parse", 0.74), ("read", 0.26)]
        assert graph.text("#matches") == "1 found, 70.0 % of all"
        assert [n for n, each in enumerate(graph.classes()) if "found" in each] == [3]
        graph.frame(3).click()
        self.switch(graph, "inuse_space")  # without parse: as near as there is
        assert graph.frames() == [*zoomed, ("read", 1.0)]
        assert "load /home/a/app.py:20" in graph.text("#details")
        assert graph.text("#matches") == "nothing found"

    def test_keys_are_enough(self, graph):
        graph.browser.execute_script("document.querySelector('#values button').focus()")
        graph.press("\ue004", " ")  # Tab
        assert graph.text("header p").startswith("alloc_space")
        graph.press("\ue004", "\ue004", "\ue007")  # Tab, Tab, Enter
        assert graph.text("header p").startswith("inuse_space")

    def test_what_there_is_nothing_of_is_switched_off(self, browser, tmp_path):
        found = of_four_values()
        for values in found.samples.values():
            values[2:] = 0, 0
        graph = Graph(browser, tmp_path, found)
        enabled = [each.is_enabled() for each in graph.find_all("#values button")]
        assert enabled == [True, True, False, False]
        assert graph.text("header p") == "alloc_space in bytes, 3 stacks, 1,000 KiB in all"

    def test_a_difference_has_them_too(self, browser, tmp_path):
        before = of_four_values()
        after = of_four_values()
        after.add((READ, MAIN), [0, 0, 1, 210 * KIB])
        after.add((PARSE, LOAD, MAIN), [-9, 0, 0, 0])
        graph = Graph(browser, tmp_path, after.minus(before), is_difference=True)
        assert graph.text("header p") == "inuse_space in bytes, 1 stack, +210 KiB in all"
        self.switch(graph, "alloc_objects")
        assert graph.text("#hottest").startswith("−9 100.0 % parse")
        assert len(graph.find_all("#legend li")) == 3
        assert not graph.find_all("#values button")[1].is_enabled()


def test_one_value_needs_no_switch(graph):
    assert not graph.browser.find_element("id", "values").is_displayed()


def test_a_search_highlights(graph):
    search = graph.browser.find_element("id", "search")
    search.send_keys("READ")
    assert ["found" in each for each in graph.classes()] == [False, False, False, True, False, True]
    assert graph.text("#matches") == "2 found, 75.0 % of all"
    found, other = graph.frame(3), graph.frame(2)
    colours = [each.value_of_css_property("background-color") for each in (found, other)]
    assert contrast(*colours) > 3
    search.send_keys("\ue00c")
    assert search.get_attribute("value") == graph.text("#matches") == ""
    assert not any("found" in each for each in graph.classes())
    search.send_keys("app.py:20")
    assert graph.text("#matches") == "1 found, 75.0 % of all"
    search.clear()
    search.send_keys("nowhere")
    assert graph.text("#matches") == "nothing found"
    search.clear()
    graph.find_all("#hottest button")[1].click()
    assert graph.text("#matches") == "1 found, 20.0 % of all"


def test_what_is_found_below_what_is_found_counts_once(browser, tmp_path):
    again = ((READ, LOAD, READ, MAIN), 30), ((MAIN,), 70)
    graph = Graph(browser, tmp_path, profile(*again))
    graph.browser.find_element("id", "search").send_keys("read")
    assert graph.text("#matches") == "2 found, 30.0 % of all"


def test_a_search_stays_while_zooming_and_escape_ends_one_after_the_other(graph):
    search = graph.browser.find_element("id", "search")
    search.send_keys("parse")
    graph.frame(2).click()
    assert ["found" in each for each in graph.classes()] == [False, False, False, False, True]
    graph.press("\ue00c")
    assert graph.frames()[2] == ("load", 1.0)
    assert not any("found" in each for each in graph.classes())
    graph.press("\ue00c")
    assert graph.frames() == WHOLE


def test_keys(graph):
    down, up, left, right = "\ue015", "\ue013", "\ue012", "\ue014"
    stops = graph.find_all("#graph [tabindex='0']")
    assert len(stops) == 1  # of the Tab key
    graph.browser.execute_script("arguments[0].focus()", stops[0])

    def reached():
        return graph.browser.switch_to.active_element.text.split()[0]

    for keys, name in (
        (down, "main"),
        (down, "load"),
        (right, "read"),
        (left, "load"),
        (down, "read"),
        (right, "parse"),
        (right, "parse"),  # there is nothing beside it
        (down, "parse"),
        (up, "load"),
    ):
        graph.press(keys)
        assert reached() == name
    graph.press("\ue007")  # Enter
    assert graph.frames()[2] == ("load", 1.0)
    assert reached() == "load"
    graph.press("\ue011")  # Home
    assert reached() == "all"
    graph.press(" ")
    assert graph.frames() == WHOLE


def test_pointing_at_a_call_tells_of_it(graph):
    from selenium.webdriver import ActionChains

    ActionChains(graph.browser).move_to_element(graph.frame(4)).perform()
    assert graph.text("#details").splitlines() == [
        "parse /v/lib/python3.12/site-packages/grammar/parser.py:7",
        "200 KiB, 20.0 % of all; of its own 200 KiB, 20.0 %",
    ]


def test_a_difference(browser, tmp_path):
    before = heap()
    after = profile(
        ((READ, LOAD, MAIN), 900 * KIB), ((PARSE, LOAD, MAIN), 200 * KIB), ((LOAD, MAIN), 50 * KIB)
    )
    graph = Graph(browser, tmp_path, after.minus(before), is_difference=True)
    assert graph.frames() == [
        ("all that changed", 1.0),
        ("main", 1.0),
        ("load", 0.62),
        ("read", 0.62),
        ("read", 0.38),
    ]
    assert graph.frame(3).text == "read +400 KiB files.py:5"
    assert graph.frame(4).text == "read −250 KiB files.py:5"
    colours = [
        [int(part) for part in re.findall(r"\d+", each.value_of_css_property("background-color"))]
        for each in graph.find_all(".frame")
    ]
    assert colours[3][0] > colours[3][2]  # red: more
    assert colours[4][2] > colours[4][0]  # blue: less
    assert colours[1] not in (colours[3], colours[4])  # pale: both, more of more
    assert len(graph.find_all("#legend li")) == 3
    assert graph.text("#hottest") == "+150 KiB 23.1 % read site-packages/shelf/files.py:5"


@pytest.mark.parametrize("is_difference", [False, True])
def test_a_profile_of_nothing_says_so(browser, tmp_path, is_difference):
    graph = Graph(browser, tmp_path, profile(), is_difference=is_difference)
    text = "Nothing changed" if is_difference else "one in 512 KiB"
    assert text in graph.text("#nothing")
    assert not graph.browser.find_element("id", "shown").is_displayed()
    graph.press("\ue00c")  # Escape: there is nothing to zoom


def test_calls_too_thin_to_see(browser, tmp_path):
    thin = [((Frame(f"f{at}", "a.py"), MAIN), 1) for at in range(30)]
    graph = Graph(browser, tmp_path, profile(((MAIN,), 10**6), *thin))
    assert graph.text("#left-out").startswith("Left out: 30 calls with less than 0.02 %")


def test_a_stack_of_5000_calls(browser, tmp_path):
    stack = tuple(Frame(f"f{at}", "a.py", at + 1) for at in reversed(range(5000)))
    graph = Graph(browser, tmp_path, profile((stack, 100)))
    assert len(graph.frames()) == 5001
    graph.browser.find_element("id", "search").send_keys("f4999")
    assert graph.text("#matches") == "1 found, 100.0 % of all"


def test_names_are_text(browser, tmp_path):
    hostile = Frame("</script><img src=x onerror=alert(1)>", "<b>.py", 1)
    graph = Graph(browser, tmp_path, profile(((hostile, MAIN), 100)))
    assert graph.frame(2).text == "</script><img src=x onerror=alert(1)> <b>.py:1"
    assert not graph.find_all("img, b")


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read(tmp_path, dark):
    """A contrast of 4.5 is what WCAG 2 asks of a text."""
    with open_browser(dark=dark) as browser:
        graph = Graph(browser, tmp_path, of_many_modules())
        body = browser.find_element("tag name", "body").value_of_css_property("background-color")
        assert (luminance(body) < 0.1) == dark

        def assert_readable():
            worst = {key: ratio for key, ratio in graph.contrasts().items() if ratio < 4.5}
            assert worst == {}

        assert len(graph.contrasts()) > 40
        assert_readable()
        graph.browser.find_element("id", "search").send_keys("f3")
        assert_readable()
        graph.press("\ue00c")
        graph.frame(2).click()
        assert_readable()
        shades = [
            profile(((PARSE, LOAD, MAIN), up * KIB), ((READ, LOAD, MAIN), -down * KIB))
            for up, down in ((9, 0), (8, 2), (7, 3), (5, 5), (3, 7), (2, 8), (0, 9))
        ]
        for difference in shades:
            graph = Graph(browser, tmp_path, difference, is_difference=True)
            assert_readable()
        graph = Graph(browser, tmp_path, of_four_values())
        assert_readable()
        assert complaints(browser) == []


@pytest.fixture(scope="module")
def of_inference(tmp_path_factory):
    """The flame graph of a real heap profile."""
    folder = tmp_path_factory.mktemp("inference")
    command = [sys.executable, "-m", "pagealloc", "profile", "--heap", "--period", "64KiB"]
    command += ["-o", str(folder), "inference.py"]
    subprocess.run(command, check=True, cwd=ROOT / "tests/support", timeout=60)
    return folder / "heap.html"


def test_a_real_profile(browser, of_inference):
    browser.get(of_inference.as_uri())
    hottest = [each.text for each in browser.find_elements("css selector", "#hottest button")]
    assert {"load", "RowPages.make_ready"} <= set(hottest)
    assert browser.find_element("id", "subtitle").text.startswith("inuse_space in bytes, ")


@pytest.mark.skipif(not WRITES_IMAGES, reason="writes a picture: PAGEALLOC_DOCS_IMAGES=1")
def test_the_picture_of_the_docs(of_inference):
    with open_browser(1280, 500) as browser:
        browser.get(of_inference.as_uri())
        height = browser.execute_script("return document.documentElement.scrollHeight")
        frame = 500 - browser.execute_script("return window.innerHeight")
        browser.set_window_size(1280, height + frame)
        assert browser.save_screenshot(str(IMAGE))
