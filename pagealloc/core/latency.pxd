"""How long allocations take: counts by duration, for each size group and NUMA node.

Buckets are log-linear: an octave, [16, 32) ns and every doubling of it, has eight of equal width.
So a bucket is at most an eighth as wide as its lower edge is high, and every 16 * 2**k is an edge:
buckets of a factor of two come from whole octaves, without splitting any.

    bucket 0      below 16 ns
    1 .. 180      [16, 18) [18, 20) ... [30, 32)  [32, 36) ...  [92274688, 100663296)
    181           100663296 ns (about 100.7 ms) and above

Size groups number the size classes first, by their index, and then the page runs by the power of
two that holds their bytes: page_bytes, 2 * page_bytes, ... 1 GiB, and one for what is larger.
"""

from libc.stdint cimport int64_t, uint64_t

from pagealloc.core.os_memory cimport os_now_ns

cdef extern from * nogil:
    int latency_clz "__builtin_clzll"(uint64_t bits)
    int latency_ctz "__builtin_ctzll"(uint64_t bits)

cdef enum:
    LATENCY_FIRST_OCTAVE = 4            # 2**4 = 16 ns
    LATENCY_OVERFLOW_NS = 3 << 25       # 100,663,296: the first edge from 100 ms on
    LATENCY_N_BUCKETS = 182             # 22 octaves and a half of 8, one below and one above
    LATENCY_MAX_GROUPS = 96
    LATENCY_MAX_RUN_LOG2 = 30           # page runs are told apart up to 1 GiB

cdef struct latency_counts_t:
    int64_t sum_ns                      # atomic
    int64_t counts[LATENCY_N_BUCKETS]   # atomic

cdef struct latency_t:
    int n_groups
    int n_nodes
    size_t node_nbytes                  # whole pages: n_groups latency_counts_t
    char *nodes                         # n_nodes * node_nbytes; NULL: there was no memory
    int64_t n_dropped                   # atomic

cdef void latency_init(latency_t *latency, int n_groups) noexcept nogil
cdef void latency_destroy(latency_t *latency) noexcept nogil
cdef void latency_record(latency_t *latency, int group, int node, int64_t ns) noexcept nogil
cdef int64_t latency_read(
    const latency_t *latency, int group, int node, int64_t *counts, int64_t *sum_ns
) noexcept nogil
cdef int64_t latency_n_dropped(const latency_t *latency) noexcept nogil
cdef list latency_histograms(const latency_t *latency, list labels)


cdef inline int64_t latency_now_ns() noexcept nogil:
    """Time for the two ends of a sample.  Reading the clock once (20 to 50 ns) is in each."""
    return os_now_ns()


cdef inline int latency_bucket(int64_t ns) noexcept nogil:
    """Which bucket a duration falls into."""
    cdef int octave
    if ns < (1 << LATENCY_FIRST_OCTAVE):
        return 0
    if ns >= LATENCY_OVERFLOW_NS:
        return LATENCY_N_BUCKETS - 1
    octave = 63 - latency_clz(<uint64_t>ns)
    # The leading one says which octave, the three bits behind it which eighth.
    return 1 + (octave - LATENCY_FIRST_OCTAVE) * 8 + (<int>(ns >> (octave - 3)) & 7)


cdef inline int latency_page_groups(size_t page_bytes) noexcept nogil:
    """How many size groups page runs have: 20 with pages of 4 KiB, 16 with 64 KiB."""
    return LATENCY_MAX_RUN_LOG2 - latency_ctz(page_bytes) + 2


cdef inline int latency_group_of_pages(int64_t n_pages, size_t page_bytes) noexcept nogil:
    """Size group of a run among those of page runs, from 0: ceil(log2(n_pages)), bounded."""
    cdef int last = latency_page_groups(page_bytes) - 1
    cdef int group
    if n_pages <= 1:
        return 0
    group = 64 - latency_clz(<uint64_t>(n_pages - 1))
    return group if group < last else last
