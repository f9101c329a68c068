"""How long allocations take.

Purpose
    Count sampled durations by size group, NUMA node and log-linear bucket, so that any quantile
    can be told to within an eighth of itself.
Structure
    latency --nodes--> | node 0: group 0, group 1, ... | node 1: ...     one reserved range
    group: sum_ns, counts[LATENCY_N_BUCKETS]
    The range is only reserved: the kernel backs a page of it when the first sample falls there,
    on the node of the thread that took it.  What is never sampled costs address space alone.
Invariants
    n_groups * sizeof(latency_counts_t) <= node_nbytes, which is whole pages
    counts and sums never fall
Locking
    None: additions and reads are atomic and relaxed.  A reader may see a sample in `counts` and
    not yet in `sum_ns`, or a later sample and not an earlier one; it never sees half a number.
    latency_init and latency_destroy have the latency_t to themselves.
Units
    Nanoseconds; counts are samples, not allocations.

After fork() parent and child have a copy each, with the counts up to then.
"""

cimport cython
from libc.stdint cimport INT64_MAX, int64_t

from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64
from pagealloc.core.os_memory cimport (
    OS_MAX_NUMA_NODES,
    os_abandon,
    os_numa_node_count,
    os_page_bytes,
    os_reserve,
)

from pagealloc.core.latency_histogram import LatencyHistogram


cdef void init_nodes(latency_t *latency, int n_groups, int n_nodes) noexcept nogil:
    cdef size_t page_bytes = os_page_bytes()
    cdef size_t nbytes = <size_t>n_groups * sizeof(latency_counts_t)
    latency.n_groups = n_groups
    latency.n_nodes = n_nodes
    latency.node_nbytes = (nbytes + page_bytes - 1) // page_bytes * page_bytes
    latency.nodes = <char *>os_reserve(<size_t>n_nodes * latency.node_nbytes, page_bytes)
    latency.n_dropped = 0


cdef void latency_init(latency_t *latency, int n_groups) noexcept nogil:
    """Start counting for 1 .. LATENCY_MAX_GROUPS groups.

    One mmap.  Where the kernel refuses it, every sample is dropped and counted as that.
    """
    init_nodes(latency, n_groups, os_numa_node_count())


cdef void latency_destroy(latency_t *latency) noexcept nogil:
    """Give the range back; nobody may be recording.  Harmless on zeros and when repeated."""
    if latency.nodes != NULL:
        os_abandon(latency.nodes, <size_t>latency.n_nodes * latency.node_nbytes)
        latency.nodes = NULL


cdef inline latency_counts_t *counts_of(
    const latency_t *latency, int group, int node
) noexcept nogil:
    """NULL for a group that is not there; a node that is not there is the nearest one."""
    if latency.nodes == NULL or group < 0 or group >= latency.n_groups:
        return NULL
    if node < 0:
        node = 0
    elif node >= latency.n_nodes:
        node = latency.n_nodes - 1
    return <latency_counts_t *>(latency.nodes + <size_t>node * latency.node_nbytes) + group


cdef void latency_record(latency_t *latency, int group, int node, int64_t ns) noexcept nogil:
    """Count one sample, from any thread; what has no place is counted in `n_dropped`."""
    cdef latency_counts_t *entry = counts_of(latency, group, node)
    if entry == NULL:
        atomic_add_i64(&latency.n_dropped, 1)
        return
    atomic_add_i64(&entry.counts[latency_bucket(ns)], 1)
    if ns > 0:
        atomic_add_i64(&entry.sum_ns, ns)


cdef int64_t latency_read(
    const latency_t *latency, int group, int node, int64_t *counts, int64_t *sum_ns
) noexcept nogil:
    """Copy LATENCY_N_BUCKETS counts and their sum; return how many samples `counts` has."""
    cdef latency_counts_t *entry = counts_of(latency, group, node)
    cdef int64_t n_samples = 0
    cdef int i
    sum_ns[0] = 0 if entry == NULL else atomic_load_i64(&entry.sum_ns)
    for i in range(LATENCY_N_BUCKETS):
        counts[i] = 0 if entry == NULL else atomic_load_i64(&entry.counts[i])
        n_samples += counts[i]
    return n_samples


cdef int64_t latency_n_dropped(const latency_t *latency) noexcept nogil:
    """How many samples found no place: the kernel refused memory, or there is no such group."""
    return atomic_load_i64(&latency.n_dropped)


# ---------------------------------------------------------------------------------------------
# The Python face

cdef list latency_histograms(const latency_t *latency, list labels):
    """A LatencyHistogram for each group and node that has samples; `labels` name the groups."""
    cdef int64_t counts[LATENCY_N_BUCKETS]
    cdef int64_t sum_ns
    cdef int group, node, i
    found = []
    if len(labels) != latency.n_groups:
        raise ValueError(f"{len(labels)} labels for {latency.n_groups} size groups")
    for group in range(latency.n_groups):
        for node in range(latency.n_nodes):
            if latency_read(latency, group, node, counts, &sum_ns):
                values = tuple([counts[i] for i in range(LATENCY_N_BUCKETS)])
                found.append(LatencyHistogram(labels[group], node, sum_ns, values))
    return found


cdef int check_page_bytes(object page_bytes) except -1:
    if page_bytes not in (4096, 16384, 65536):
        raise ValueError(f"page_bytes={page_bytes!r}: pages have 4096, 16384 or 65536 bytes")
    return 0


def bucket_of(ns: int) -> int:
    """Return the index of the bucket that counts a duration of `ns` nanoseconds."""
    return latency_bucket(ns)


def group_of_pages(n_pages: int, page_bytes: int) -> int:
    """Return the size group, among those of page runs, of a run of `n_pages`."""
    check_page_bytes(page_bytes)
    return latency_group_of_pages(n_pages, page_bytes)


def page_group_count(page_bytes: int) -> int:
    """Return how many size groups page runs have."""
    check_page_bytes(page_bytes)
    return latency_page_groups(page_bytes)


@cython.final
@cython.auto_pickle(False)
cdef class LatencyTable:
    """A latency_t of one's own, to test it and to measure what a sample costs.

    Parameters
    ----------
    labels : sequence of str
        Names of the size groups, 1 to 96.
    n_nodes : int, optional
        NUMA nodes told apart, 1 to 64; by default those of the machine.

    Raises
    ------
    ValueError
        Too few or too many groups or nodes.

    Notes
    -----
    Any number of threads may record and read at the same time.
    """

    cdef latency_t latency
    cdef list labels

    def __init__(self, labels, n_nodes=None):
        names = list(labels)
        n_nodes = os_numa_node_count() if n_nodes is None else n_nodes
        if not 1 <= len(names) <= LATENCY_MAX_GROUPS:
            raise ValueError(f"{len(names)} labels: 1 to {LATENCY_MAX_GROUPS} groups are possible")
        if not 1 <= n_nodes <= OS_MAX_NUMA_NODES:
            raise ValueError(f"n_nodes={n_nodes}: 1 to {OS_MAX_NUMA_NODES} nodes are possible")
        if self.labels is not None:
            raise TypeError("a LatencyTable is initialised once: make a new one")
        init_nodes(&self.latency, <int>len(names), n_nodes)
        self.labels = names

    def __dealloc__(self):
        latency_destroy(&self.latency)

    def record(self, group: int, node: int, ns: int, *, times: int = 1, step_ns: int = 0) -> None:
        """Count `times` samples of `ns`, `ns + step_ns`, ... nanoseconds, without the GIL."""
        cdef int to_group = group
        cdef int on_node = node
        cdef int64_t now_ns = ns
        cdef int64_t by_ns = step_ns
        cdef int64_t left = times
        with nogil:
            while left > 0:
                latency_record(&self.latency, to_group, on_node, now_ns)
                now_ns += by_ns
                left -= 1

    def histograms(self) -> list:
        """Return a LatencyHistogram for each group and node that has samples."""
        return latency_histograms(&self.latency, self.labels)

    @property
    def n_dropped(self) -> int:
        """Samples that found no place."""
        return latency_n_dropped(&self.latency)

    def time_pair_ns(self) -> int:
        """Return what lies between two readings of the clock: the least a sample can show."""
        cdef int64_t least_ns = INT64_MAX
        cdef int64_t start_ns
        cdef int _i
        for _i in range(1000):
            start_ns = latency_now_ns()
            least_ns = min(least_ns, latency_now_ns() - start_ns)
        return least_ns
