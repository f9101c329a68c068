"""What heaps take from the kernel and give back: lines for PAGEALLOC_TRACE=1, events for spans.

Purpose
    Say on stderr, a line each as Go's gctrace does, when an arena is reserved, when memory goes
    back, and when caches are collected.  The first two are events as well, if somebody watches.
Structure
    trace_xxx -> begin (who, when) -> what happened -> write(2)
              -> keep_event
Locking
    None of its own; callers may hold any mutex.  A line is one write(2), so those of several
    threads do not mix.  Who does not read the other end of a pipe stops the heap: it is for the
    search of reasons.
Units
    Bytes as given, MiB as shown; nanoseconds as given, seconds since the import as shown.
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from posix.unistd cimport STDERR_FILENO, write

from pagealloc.core.backing cimport BACKING_HUGETLB, BACKING_THP
from pagealloc.core.event_ring cimport (
    EVENT_ARENA_GROWTH,
    EVENT_TRIM,
    events_are_watched,
    keep_event,
)
from pagealloc.core.os_memory cimport os_now_ns

from pagealloc.options import option_value

cdef extern from "os_compat.h" nogil:
    void set_errno "pagealloc_set_errno"(int error)

cdef enum:
    LINE_BYTES = 200

cdef bint is_on = option_value("trace") == "1"
cdef int64_t import_ns = os_now_ns()
cdef double MIB = 1 << 20


cdef bint trace_is_on() noexcept nogil:
    return is_on


cdef int64_t trace_now_ns() noexcept nogil:
    """When something begins; 0 if nobody wants to know."""
    return os_now_ns() if is_on or events_are_watched() else 0


cdef int begin(char *line, int64_t heap_number) noexcept nogil:
    return snprintf(
        line, LINE_BYTES, "pagealloc: heap %lld @%.3fs: ", <long long>heap_number,
        <double>(os_now_ns() - import_ns) / 1e9
    )


cdef void end(const char *line, int n) noexcept nogil:
    cdef int error = errno
    # Nobody can be told that this was refused; what the caller's errno says is worth more.
    if write(STDERR_FILENO, line, <size_t>(n if n < LINE_BYTES else LINE_BYTES - 1)) < 0:
        set_errno(error)


cdef void trace_arena(
    int64_t heap_number, int64_t nbytes, int achieved_backing, int64_t begun_at_ns,
    int64_t reserved_bytes
) noexcept nogil:
    """An arena was reserved."""
    cdef char line[LINE_BYTES]
    cdef int n
    keep_event(EVENT_ARENA_GROWTH, heap_number, begun_at_ns, nbytes)
    if not is_on:
        return
    n = begin(line, heap_number)
    n += snprintf(
        line + n, <size_t>(LINE_BYTES - n), "arena of %.2f MiB, %s; %.2f MiB reserved\n",
        <double>nbytes / MIB,
        b"hugetlb" if achieved_backing == BACKING_HUGETLB
        else b"thp" if achieved_backing == BACKING_THP else b"base",
        <double>reserved_bytes / MIB
    )
    end(line, n)


cdef void trace_purge(
    int64_t heap_number, int kind, int64_t purged_bytes, int64_t begun_at_ns,
    int64_t committed_bytes, int64_t reserved_bytes
) noexcept nogil:
    """Memory went back: EVENT_PURGE or EVENT_TRIM."""
    cdef char line[LINE_BYTES]
    cdef int n
    keep_event(kind, heap_number, begun_at_ns, purged_bytes)
    if not is_on:
        return
    n = begin(line, heap_number)
    n += snprintf(
        line + n, <size_t>(LINE_BYTES - n),
        "%s of %.2f MiB in %.3f ms; %.2f MiB committed of %.2f MiB\n",
        b"trim" if kind == EVENT_TRIM else b"purge",
        <double>purged_bytes / MIB, <double>(os_now_ns() - begun_at_ns) / 1e6,
        <double>committed_bytes / MIB, <double>reserved_bytes / MIB
    )
    end(line, n)


cdef void trace_collection(
    int64_t heap_number, int64_t begun_at_ns, int64_t idle_bytes_before, int64_t idle_bytes
) noexcept nogil:
    """Caches were collected."""
    cdef char line[LINE_BYTES]
    cdef int n
    if not is_on:
        return
    n = begin(line, heap_number)
    n += snprintf(
        line + n, <size_t>(LINE_BYTES - n), "collection in %.3f ms; %.2f -> %.2f MiB idle\n",
        <double>(os_now_ns() - begun_at_ns) / 1e6, <double>idle_bytes_before / MIB,
        <double>idle_bytes / MIB
    )
    end(line, n)
