"""Memory from the kernel, in Cython: arenas, slabs, page runs, extents and windows.

Rooms by floor; a room imports only rooms on lower floors (``tests/unit/test_floors.py`` holds
this by reading the table below)::

    1  os_memory     the only room that calls the OS, through one table of functions
    1  atomics       compiler built-ins for atomic loads, stores and exchanges
    1  size_class    bytes -> size class; pure arithmetic
    1  interval_map  disjoint page ranges that carry a value; pure data structure
    2  page_map      address -> arena, for the whole process
    2  run_tree      free page runs ordered by (pages, address); best fit
    3  arena         reserves ranges, carves and coalesces page runs, commits and purges
    3  extents       ExtentStore: reference-counted pages of one memfd
    4  central       one size class: slabs of equal slots behind a mutex
    4  window        Window: one contiguous address range over an ExtentStore
    6  heap          alloc / free / trim / stats / budget, nogil; process-wide state
    7  buffer        Buffer: the Python handle of one slot or run
    8  allocator     PageAllocator: the Python face of a heap

Everything below the Buffer is nogil and reports failure by NULL or a code; Python exceptions
are raised at the Python boundary only.
"""
