"""What heaps take from the kernel and give back: lines for PAGEALLOC_TRACE=1, events."""

from libc.stdint cimport int64_t

cdef bint trace_is_on() noexcept nogil
cdef int64_t trace_now_ns() noexcept nogil
cdef void trace_arena(
    int64_t heap_number, int64_t nbytes, int achieved_backing, int64_t begun_at_ns,
    int64_t reserved_bytes
) noexcept nogil
cdef void trace_purge(
    int64_t heap_number, int kind, int64_t purged_bytes, int64_t begun_at_ns,
    int64_t committed_bytes, int64_t reserved_bytes
) noexcept nogil
cdef void trace_collection(
    int64_t heap_number, int64_t begun_at_ns, int64_t idle_bytes_before, int64_t idle_bytes
) noexcept nogil
