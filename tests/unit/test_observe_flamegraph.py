"""Flame graphs: what a page holds.  How it looks and acts in a browser is in tests/servers."""

import html.parser
import json
from collections import Counter

import pytest

from pagealloc.observe.flamegraph import flame_graph
from pagealloc.observe.profiles import Frame, Profile, ValueType

SPACE = ValueType("alloc_space", "bytes")
OBJECTS = ValueType("alloc_objects", "count")
MAIN = Frame("main", "app.py", 10)
LOAD = Frame("load", "app.py", 20)
READ = Frame("read", "lib/io.py", 5)


def profile(samples=()):
    made = Profile((OBJECTS, SPACE), SPACE, 4096)
    for stack, *values in samples:
        made.add(stack, values)
    return made


class Page(html.parser.HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._within = Counter(), {}, ["document"]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        name = dict(attrs).get("id", tag) if tag == "script" else tag
        self.tags[name] += 1
        if tag in ("title", "h1", "script", "header"):
            self._within.append(name)

    def handle_endtag(self, tag):
        if tag in ("title", "h1", "script", "header"):
            self._within.pop()

    def handle_data(self, data):
        self.texts[self._within[-1]] = self.texts.get(self._within[-1], "") + data

    @property
    def data(self):
        return json.loads(self.texts["data"])

    @property
    def first(self):
        """The value that is shown first."""
        return self.data["views"][self.data["first"]]

    @property
    def nodes(self):
        """Function and place, of which node, weight, value, own value; of what is shown first."""
        return self.nodes_of(self.data["first"])

    def nodes_of(self, number):
        data = self.data
        names = [*(name for name, _, _ in data["frames"]), ""]
        columns = [data["views"][number]["nodes"][at::5] for at in range(5)]
        nodes, newest = [], {-1: -1}
        for depth, frame, *values in zip(*columns, strict=True):
            nodes.append((names[frame], newest[depth - 1], *values))
            newest[depth] = len(nodes) - 1
        return nodes


def page_of(found, **options):
    return Page(flame_graph(found, options.pop("title", "a title"), **options))


def test_calls_stand_behind_those_that_led_to_them():
    found = profile([((READ, LOAD, MAIN), 1, 100), ((MAIN,), 1, 7), ((LOAD, MAIN), 3, 30)])
    page = page_of(found)
    assert page.nodes == [
        ("", -1, 137, 137, 0),
        ("main", 0, 137, 137, 7),
        ("load", 1, 130, 130, 30),
        ("read", 2, 100, 100, 100),
    ]
    assert page.data["frames"] == [
        ["main", "app.py:10", 0],
        ["load", "app.py:20", 0],
        ["read", "lib/io.py:5", 1],
    ]
    assert page.data["modules"] == ["app", "io"]
    assert page.first["shares"] == [37, 100]
    assert page.first["hottest"] == [
        ["read", "lib/io.py:5", 100],
        ["load", "app.py:20", 30],
        ["main", "app.py:10", 7],
    ]
    assert (page.first["name"], page.first["unit"]) == ("alloc_space", "bytes")
    assert page.first["nStacks"] == 3


def test_all_values_are_there():
    page = page_of(profile([((MAIN,), 3, 0), ((LOAD,), 0, 5), ((READ, MAIN), 1, 1)]))
    assert page.nodes_of(0) == [("", -1, 4, 4, 0), ("main", 0, 4, 4, 3), ("read", 1, 1, 1, 1)]
    assert page.nodes_of(1) == [
        ("", -1, 6, 6, 0),
        ("load", 0, 5, 5, 5),
        ("main", 0, 1, 1, 0),
        ("read", 2, 1, 1, 1),
    ]
    views = page.data["views"]
    assert [view["name"] for view in views] == ["alloc_objects", "alloc_space"]
    assert [view["nStacks"] for view in views] == [2, 2]
    assert [view["hottest"][0][0] for view in views] == ["main", "load"]
    assert page.data["modules"] == ["app", "io"]
    assert [view["shares"] for view in views] == [[3, 1], [5, 1]]


def test_modules_come_by_their_largest_share_of_any_value():
    found = profile([((READ,), 9, 100), ((Frame("f", "b.py"),), 1, 900), ((MAIN,), 90, 100)])
    page = page_of(found)
    assert page.data["modules"] == ["app", "b", "io"]
    assert page.first["shares"] == [100, 900, 100]


@pytest.mark.parametrize("which", [0, 1, -1, -2])
def test_which_value_is_shown_first(which):
    page = page_of(profile([((MAIN,), 3, 5)]), which=which)
    assert page.data["first"] == which % 2


def test_a_value_that_there_is_nothing_of_is_not_shown_first():
    names = ["alloc_objects", "alloc_space", "inuse_objects", "inuse_space"]
    found = Profile(tuple(ValueType(name, "count") for name in names), SPACE, 4096)
    found.add((MAIN,), [2, 100, 0, 0])
    assert page_of(found).first["name"] == "alloc_space"
    assert page_of(found, which=0).first["name"] == "alloc_objects"
    found.samples = {}
    assert page_of(found, which=1).first["name"] == "alloc_space"


def test_the_widest_stands_first():
    found = profile([((READ, MAIN), 1, 5), ((LOAD, MAIN), 1, 5), ((MAIN, MAIN), 1, 9)])
    assert [node[0] for node in page_of(found).nodes] == ["", "main", "main", "load", "read"]


def test_a_stack_without_calls_is_its_own():
    assert page_of(profile([((), 1, 5)])).nodes == [("", -1, 5, 5, 5)]


def test_a_difference_is_as_wide_as_what_changed():
    found = profile([((LOAD, MAIN), 0, 30), ((READ, MAIN), 0, -50), ((MAIN,), 0, 1)])
    page = page_of(found, is_difference=True)
    assert page.data["isDifference"]
    assert page.nodes == [
        ("", -1, 81, -19, 0),
        ("main", 0, 81, -19, 1),
        ("read", 1, 50, -50, -50),
        ("load", 1, 30, 30, 30),
    ]


def test_a_profile_of_nothing():
    page = page_of(profile())
    assert page.nodes == [("", -1, 0, 0, 0)]
    assert page.first["hottest"] == []
    assert (page.data["period"], page.data["periodUnit"]) == (4096, "bytes")


def test_calls_too_thin_are_counted_and_left_out():
    thin = [((Frame(f"f{at}", "a.py"), MAIN), 0, 1) for at in range(30)]
    page = page_of(profile([((MAIN,), 0, 10_000), *thin]))
    assert [node[0] for node in page.nodes] == ["", "main"]
    assert page.first["nLeftOut"] == 30
    assert page.data["modules"] == ["app"]
    assert page.first["shares"] == [10_000]


@pytest.mark.parametrize("is_one_call", [True, False])
def test_a_stack_of_5000_calls(is_one_call):
    stack = tuple(Frame("f", "a.py", 1 if is_one_call else at) for at in range(5000))
    page = page_of(profile([(stack, 1, 64)]))
    nodes = page.nodes
    assert len(nodes) == len(page.nodes_of(0)) == 5001
    assert len(page.data["frames"]) == len(set(stack))
    assert [node[1] for node in nodes] == list(range(-1, 5000))


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "__DATA__ __TITLE__ __SCRIPT__",
    "\\1 \\g<0> ${x} {{x}}",
    '"&<>\u2028\u0000\\',
    "größer",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_end_nothing_and_are_no_marks(name):
    found = profile([((Frame(name, name, 1), MAIN), 1, 100)])
    found.value_types = (OBJECTS, ValueType(name, name))
    text = flame_graph(found, name)
    page, plain = Page(text), page_of(profile([((READ, MAIN), 1, 100)]))
    assert page.tags == plain.tags
    assert page.data["frames"][1][:2] == [name, f"{name}:1"]
    assert (page.first["name"], page.first["unit"]) == (name, name)
    if "\u0000" not in name:  # which no HTML can hold
        assert page.texts["title"] == page.texts["h1"] == name
    assert page.texts["script"] == plain.texts["script"]


def test_a_page_can_be_written_whatever_bytes_a_name_holds():
    found = profile([((Frame("f", "caf\udce9.py", 1),), 1, 100)])
    text = flame_graph(found, "caf\udce9")
    assert Page(text.encode().decode()).texts["title"] == "caf\\udce9"


def test_a_page_needs_nothing_else():
    text = flame_graph(profile([((MAIN,), 1, 100)]), "a title")
    page = Page(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("/home/a/app.py", "app"),
        ("app.py", "app"),
        ("/usr/lib/python3.11/threading.py", "threading"),
        ("/usr/lib/python3.13t/json/decoder.py", "json"),
        ("/v/lib/python3.12/site-packages/numpy/linalg/_linalg.py", "numpy"),
        ("/usr/lib/python3/dist-packages/six.py", "six"),
        ("/v/lib/python3.12/site-packages/_cffi.cpython-312-x86_64-linux-gnu.so", "_cffi"),
        ("/v/lib/python3.12/site-packages/pagealloc/kv/cache.py", "pagealloc"),
        ("pagealloc/core/heap_owner.pyx", "pagealloc"),
        ("<frozen importlib._bootstrap_external>", "importlib"),
        ("<string>", "string"),
        ("<>", "<>"),
        ("", "f"),
    ],
)
def test_modules(file, module):
    found = profile([((Frame("f", file, 1),), 1, 100)])
    page = page_of(found)
    assert page.data["modules"] == [module]
    assert page.first["shares"] == [100]
