"""Profiles: values by stack, their hottest lines, folded stacks, differences."""

import pytest

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


def test_values_of_a_stack_add_up():
    found = profile([((LOAD, MAIN), 1, 100), ((LOAD, MAIN), 2, 50), ((MAIN,), 1, 7)])
    assert found.samples == {(LOAD, MAIN): [3, 150], (MAIN,): [1, 7]}
    assert found.total() == 157
    assert found.total(0) == 4


def test_values_that_are_added_are_not_kept_as_the_callers_list():
    values = [1, 100]
    found = profile()
    found.add((MAIN,), values)
    found.add((MAIN,), values)
    assert values == [1, 100]


@pytest.mark.parametrize("values", [[], [1], [1, 2, 3]])
def test_values_are_as_many_as_types(values):
    found = profile([((MAIN,), 1, 2)])
    with pytest.raises(ValueError, match="where 2 belong"):
        found.add((MAIN,), values)
    assert found.samples == {(MAIN,): [1, 2]}


def test_hottest_lines_are_the_innermost():
    found = profile(
        [((READ, LOAD, MAIN), 1, 100), ((READ, MAIN), 1, 50), ((LOAD, MAIN), 9, 120), ((), 1, 999)]
    )
    assert found.hottest(5) == [(READ, 150), (LOAD, 120)]
    assert found.hottest(1) == [(READ, 150)]
    assert found.hottest(5, 0) == [(LOAD, 9), (READ, 2)]


def test_equally_hot_lines_come_in_one_order():
    forth = profile([((frame,), 1, 5) for frame in (MAIN, READ, LOAD)])
    back = profile([((frame,), 1, 5) for frame in (LOAD, READ, MAIN)])
    assert forth.hottest(2) == back.hottest(2)


def test_folded_stacks():
    found = profile([((READ, LOAD, MAIN), 1, 100), ((MAIN,), 1, 7), ((LOAD,), 3, 0)])
    assert found.folded() == (
        "main (app.py:10) 7\nmain (app.py:10);load (app.py:20);read (lib/io.py:5) 100\n"
    )
    assert found.folded(0).count("\n") == 3


@pytest.mark.parametrize(
    ("stack", "line"),
    [
        ((Frame("f;g", "a;b.py", 1),), "f,g (a,b.py:1) 1\n"),
        ((Frame("f\ng", "a  b.py", 1),), "f g (a b.py:1) 1\n"),
        ((Frame("f", "a.py"),), "f (a.py) 1\n"),
        ((Frame("0x1f", ""),), "0x1f 1\n"),
        ((Frame("", ""),), "(no name) 1\n"),
        ((), "(no stack) 1\n"),
    ],
)
def test_each_folded_stack_is_one_line_of_as_many_calls(stack, line):
    assert profile([(stack, 1, 1)]).folded() == line


def test_stacks_that_fold_alike_are_one_line():
    found = profile([((Frame("a;b", ""),), 1, 1), ((Frame("a,b", ""),), 1, 2)])
    assert found.folded() == "a,b 3\n"


def test_a_difference():
    before = profile([((MAIN,), 1, 10), ((LOAD, MAIN), 5, 50), ((READ,), 2, 2)])
    after = profile([((MAIN,), 1, 10), ((LOAD, MAIN), 6, 30), ((READ, MAIN), 1, 5)])
    after.time_ns, after.duration_ns, before.duration_ns = 7, 30, 10
    found = after.minus(before)
    assert found.samples == {(LOAD, MAIN): [1, -20], (READ, MAIN): [1, 5], (READ,): [-2, -2]}
    assert (found.time_ns, found.duration_ns) == (7, 20)
    assert found.hottest(5) == [(LOAD, -20), (READ, 3)]
    assert "load (app.py:20) -20\n" in found.folded()
    assert before.samples[LOAD, MAIN] == [5, 50]
    assert after.samples[LOAD, MAIN] == [6, 30]
    assert after.minus(after).samples == {}


def test_profiles_of_other_things_have_no_difference():
    other = Profile((SPACE,), SPACE, 4096)
    with pytest.raises(ValueError, match=r"alloc_objects \(count\), .* of alloc_space \(bytes\)"):
        profile().minus(other)
