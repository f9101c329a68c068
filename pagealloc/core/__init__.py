"""Memory from the kernel, in Cython: arenas, slabs, page runs, extents and windows.

Rooms by floor; a room imports only rooms on lower floors (``tests/unit/test_floors.py`` holds
this by reading the table below)::

    1  atomics          compiler built-ins for atomic loads, stores and additions
    1  mutex            POSIX mutexes
    1  export           filling a Py_buffer with plain bytes
    1  counters         the fields of stats(), listed once
    1  latency_histogram  one latency distribution, as Python sees it
    1  leaks            blocks that are live at exit, and where they were allocated
    1  size_class       bytes -> size class; pure arithmetic
    1  interval_map     disjoint page ranges that carry a value; pure data structure
    1  item_table       what a pool knows of its items, by address; pure data structure
    1  machine_memory   how much memory the machine and its cgroups have left
    1  folios           whether a memfd gets 64 KiB folios here
    2  os_memory        memory from the OS; every call of the kernel goes through its table
    3  lock_waits       how long threads wait for the mutexes that they share
    3  event_ring       slow events, kept for a thread of Python's
    3  os_file          the one sparse file of a store
    3  os_pages         what the kernel knows of single pages; NUMA nodes

    Arenas, from the bottom up:

    3  latency          how long allocations take, by size group and NUMA node
    3  owner_lock       a lock that its owner takes for nothing, and a collector at a price
    3  page_map         address -> chunk, its classes and states, for the whole process
    3  page_run         descriptors of page runs; the free ones as a best-fit tree
    4  noted            which blocks, and which waits, are noted with their Python stack
    4  backing          the ladder hugetlb, THP, base; which NUMA node
    5  trace            lines on what is taken from the kernel and given back
    5  arena            one reserved range, and what of it is committed
    4  block_map        where the state of a block is
    6  free_runs        which pages belong to which run; fit, carve, merge
    7  arenas           the arenas of one heap: how they come, go, and give back
    8  page_purge       what is free goes back: by itself, or by trim()
    9  page_budget      what a heap may use: its ledger against its budget
    10  page_heap       the page runs of all arenas: growth, budget
    11  page_resize     page runs made longer or shorter, where they are or by their page tables
    11  slabs           the slots of one size class, cut from page runs
    12  central         the free blocks of one size class that no thread holds
    13  thread_cache    a thread's magazines for one heap, as the thread uses them
    14  collector       what others do with a thread's magazines
    15  heap_state      what a heap is made of; its size classes
    16  guard            blocks of a heap that finds errors: guards around them, or once freed
    16  heap_caches     the caches of all threads; what is idle, and how it goes back
    16  heap_options    the settings of a heap, read and checked
    16  heap_latency    which allocations are timed, and into which histogram they go
    17  heap_counts     what a heap holds, counted; whether that adds up
    17  heap_slow       what alloc and free do when the magazine does not do
    17  heap_life       making and unmaking heaps; all of the process; fork
    18  heap_stats      what a heap holds, as Python sees it
    18  heap_refusal    what a refused request is told
    18  purger          the thread that gives idle memory back
    19  heap            the way of one allocation, and of one free
    20  heap_resize     a live block made longer or shorter
    20  heap_owner      Heap: the Python owner of a heap: settings, errors, stats
    21  buffer          Buffer: the Python handle of one slot or run
    22  prefault        memory made physical before somebody waits for it
    22  batch           Batch: many blocks under one handle
    23  exact           ExactClass: blocks of a caller's own size, not rounded
    24  allocator       PageAllocator: the Python face
    25  idle_items      IdleItems: what lies idle in a pool, and what it knows of every item
    26  pool            Pool: idle Buffers and objects, kept for reuse
    25  c_api           heaps for native code of other packages: cimport, and a table for C
    25  numpy_handler   NumPy's arrays in an allocator's memory (NEP 49)

    Windows, from the bottom up; they share nothing with arenas but the first three floors:

    4  extent_pages     the pages of one memfd: reference counts, commit, punch, budget
    5  store_registry   all stores of the process, and what fork() does with them
    5  window_pages     one window: its mappings and the extents behind them, nogil
    6  huge_pages       whole huge pages of a window backed by huge pages, where the kernel can
    7  window_plan      a change of what stands behind a window's pages: planned, then applied
    8  remap            commit, share, make_private, release, shift: what each of them means
    7  extents          ExtentStore: the Python face of one memfd
    9  window_view      WindowView: a range of a window, exported through the buffer protocol
    10  window          Window: the Python face of one address range

Everything below the Buffer is nogil and reports failure by NULL or a code; Python exceptions
are raised at the Python boundary only.
"""
