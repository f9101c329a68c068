"""The newest slow events of the core, kept for the one who takes them now and then."""

from libc.stdint cimport int64_t

cdef enum:
    EVENT_ARENA_GROWTH
    EVENT_PURGE
    EVENT_TRIM

cdef bint events_are_watched() noexcept nogil
cdef void keep_event(
    int kind, int64_t heap_number, int64_t begun_at_ns, int64_t nbytes
) noexcept nogil
