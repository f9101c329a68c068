"""The settings of a heap.

Purpose
    Turn what a caller asks for into what a heap is made of, or say what is wrong with it.
Structure
    PageAllocator(backing=..., budget_bytes=..., ...) -> read_options -> heap_options_t
Locking
    None.
Units
    Bytes; seconds as the caller gives them, nanoseconds as the heap has them.
"""

import operator
import os

from libc.stdint cimport int64_t
from libc.string cimport memset

from pagealloc.core.backing cimport BACKING_BASE, BACKING_HUGETLB, BACKING_THP, round_up
from pagealloc.core.heap_state cimport GUARD_FREED, GUARD_SLOT
from pagealloc.core.os_memory cimport os_huge_page_bytes, os_page_bytes
from pagealloc.core.page_map cimport CHUNK_BYTES

from pagealloc.core.machine_memory import available_bytes
from pagealloc.units import format_bytes, parse_bytes

BACKINGS = {
    "auto": BACKING_HUGETLB | BACKING_THP | BACKING_BASE,
    "hugetlb": BACKING_HUGETLB,
    "thp": BACKING_THP,
    "base": BACKING_BASE,
}
cdef dict GUARDS = {
    "slot": GUARD_SLOT,
    "freed": GUARD_FREED,
    "slot+freed": GUARD_SLOT | GUARD_FREED,
}
cdef object ON_FORK = ("inherit", "dontfork")
cdef double SHORTEST_PURGE_S = 0.01, LONGEST_PURGE_S = 86400.0
cdef int MAX_NODES = 64


cdef int ladder_of(str backing, int64_t arena_bytes, int64_t budget_bytes) except -1:
    """The backings to try.  Under a budget, "auto" leaves out what would be spent on rounding.

    A hugetlb arena leaves the machine's pool whole, and a touch of a huge page commits all of it.
    """
    if backing != "auto" or budget_bytes < 0:
        return BACKINGS[backing]
    return BACKING_BASE if budget_bytes < arena_bytes else BACKING_THP | BACKING_BASE


cdef int64_t purge_after_ns(object seconds) except -1:
    if seconds is None:
        return 0
    try:
        seconds = float(seconds)
    except (TypeError, ValueError):
        raise TypeError(
            f"purge_after_s={seconds!r}: a number of seconds, or None for never"
        ) from None
    if not SHORTEST_PURGE_S <= seconds <= LONGEST_PURGE_S:
        raise ValueError(
            f"purge_after_s={seconds:g}: from {SHORTEST_PURGE_S:g} to {LONGEST_PURGE_S:g} seconds "
            f"are possible, or None for never"
        )
    return <int64_t>(<double>seconds * 1e9)


cdef object online_nodes():
    """The numbers of the machine's NUMA nodes; one, 0, where the kernel has none."""
    nodes = []
    try:
        with open("/sys/devices/system/node/online", encoding="ascii") as file:
            for part in file.read().strip().split(","):      # such as 0-1,8
                first, _, last = part.partition("-")
                nodes += range(int(first), int(last or first) + 1)
    except (OSError, ValueError):
        pass
    return nodes or [0]


cdef int checked_node(str name, object node) except -2:
    """A node's number; -1 for None."""
    if node is None:
        return -1
    node = operator.index(node)
    nodes = online_nodes()
    if node not in nodes or node >= MAX_NODES:
        listed = ", ".join(map(str, nodes))
        raise ValueError(
            f"{name}={node}: this machine has {len(nodes)} NUMA "
            f"node{'s' if len(nodes) > 1 else ''}: {listed}"
        )
    return node


cdef str describe_node(dict settings):
    """What to say about the NUMA node that memory comes from; empty if none was asked for."""
    for name, of_several in (("numa_node", ""), ("preferred", "as long as it has memory")):
        if settings[name] is not None:
            remark = of_several if len(online_nodes()) > 1 else "the only one"
            return f"NUMA node {settings[name]}" + (f" ({remark})" if remark else "")
    return ""


cdef size_t hugetlb_page_bytes(object asked, str backing) except 0:
    """Which of the machine's hugetlb pages; None: those of a huge page's usual size."""
    if asked is None:
        return os_huge_page_bytes()
    if backing != "hugetlb":
        raise ValueError(f"huge_page_bytes={asked!r} is for backing='hugetlb', not {backing!r}")
    nbytes = parse_bytes(asked, name="huge_page_bytes")
    try:
        folders = os.listdir("/sys/kernel/mm/hugepages")
    except OSError:
        folders = []
    sizes = sorted(
        int(folder.removeprefix("hugepages-").removesuffix("kB")) << 10 for folder in folders
    )
    if nbytes not in sizes:
        listed = ", ".join(map(format_bytes, sizes)) or "none"
        raise ValueError(
            f"huge_page_bytes={asked!r}: the huge pages of this machine's kernel are {listed}"
        )
    return nbytes


cdef int guard_of(object guard) except -1:
    if not isinstance(guard, str) or guard not in GUARDS:
        raise ValueError(f"guard={guard!r}: possible are None, {', '.join(map(repr, GUARDS))}")
    return GUARDS[guard]


cdef int64_t budget_of(object budget_bytes) except -2:
    if budget_bytes is None:
        return -1
    if budget_bytes == "auto":
        # Whole pages, and one at least: a budget of nothing is no budget.
        return max(available_bytes() // os_page_bytes(), 1) * <int64_t>os_page_bytes()
    return parse_bytes(budget_bytes, name="budget_bytes")


cdef int read_options(heap_options_t *options, dict settings) except -1:
    """Fill in `options`; raises TypeError or ValueError for what is not possible."""
    backing = settings["backing"]
    if not isinstance(backing, str) or backing not in BACKINGS:
        raise ValueError(f"backing={backing!r}: possible are {', '.join(map(repr, BACKINGS))}")
    if settings["on_fork"] not in ON_FORK:
        raise ValueError(
            f"on_fork={settings['on_fork']!r}: possible are {', '.join(map(repr, ON_FORK))}"
        )
    if settings["numa_node"] is not None and settings["preferred"] is not None:
        raise ValueError(
            "numa_node= and preferred= exclude each other: one binds, the other one prefers"
        )
    memset(options, 0, sizeof(heap_options_t))
    options.placement.hugetlb_bytes = hugetlb_page_bytes(settings["huge_page_bytes"], backing)
    options.arena_bytes = round_up(
        parse_bytes(settings["arena_bytes"], name="arena_bytes", minimum=os_page_bytes()),
        options.placement.hugetlb_bytes if backing == "hugetlb" else CHUNK_BYTES
    )
    options.budget_bytes = budget_of(settings["budget_bytes"])
    options.placement.ladder = ladder_of(backing, options.arena_bytes, options.budget_bytes)
    options.placement.node = checked_node("numa_node", settings["numa_node"])
    options.placement.node_is_strict = options.placement.node >= 0
    if not options.placement.node_is_strict:
        options.placement.node = checked_node("preferred", settings["preferred"])
    options.placement.is_wiped_on_fork = settings["on_fork"] == "dontfork"
    options.purge_after_ns = purge_after_ns(settings["purge_after_s"])
    options.zero_on_reuse = bool(settings["zero_on_reuse"])
    if settings["guard"] is not None:
        options.guard = guard_of(settings["guard"])
        if backing not in ("auto", "base"):
            raise ValueError(
                f"guard={settings['guard']!r} guards single pages: "
                f"use backing='base', not {backing!r}"
            )
        options.placement.ladder = BACKING_BASE
    return 0
