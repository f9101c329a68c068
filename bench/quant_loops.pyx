# cython: boundscheck=False, wraparound=False, cdivision=True, language_level=3
"""Loops that the benchmark of quantised rows times; compiled when it runs."""

from libc.stdint cimport int64_t, uintptr_t

from pagealloc.kv.quant cimport codec_t, fill_codec, fill_plain, pack_row, plain_t, unpack_row

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *time)

ctypedef void (*row_function_t)(const void *source, void *target, int64_t n_values) noexcept nogil


cdef int64_t now_ns() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


def time_ours(
    str given, str stored, bint packs, int64_t group, int64_t n_values,
    const unsigned char[:, ::1] source, unsigned char[:, ::1] target, int64_t n_loops,
):
    """Pack, or unpack, each row of an array with our row functions; return nanoseconds."""
    cdef codec_t codec
    cdef plain_t wanted
    cdef int64_t i, row, n_rows = source.shape[0], start_ns
    fill_codec(&codec, given, stored, n_values, group)
    fill_plain(&wanted, given)
    with nogil:
        start_ns = now_ns()
        for i in range(n_loops):
            for row in range(n_rows):
                if packs:
                    pack_row(&codec, <const char *>&source[row, 0], <char *>&target[row, 0])
                else:
                    unpack_row(
                        &codec, <const char *>&source[row, 0], <char *>&target[row, 0], &wanted
                    )
        start_ns = now_ns() - start_ns
    return start_ns


def time_theirs(
    uintptr_t function, int64_t n_values, const unsigned char[:, ::1] source,
    unsigned char[:, ::1] target, int64_t n_loops,
):
    """Call one of ggml's row functions for each row of an array; return nanoseconds."""
    cdef row_function_t call = <row_function_t>function
    cdef int64_t i, row, n_rows = source.shape[0], start_ns
    with nogil:
        start_ns = now_ns()
        for i in range(n_loops):
            for row in range(n_rows):
                call(&source[row, 0], &target[row, 0], n_values)
        start_ns = now_ns() - start_ns
    return start_ns
