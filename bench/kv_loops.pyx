# cython: boundscheck=False, wraparound=False, cdivision=True, language_level=3
"""Loops that the KV benchmarks compare with, and those it times; compiled when it runs."""

from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memcpy

from pagealloc.kv.quant cimport codec_t, fill_codec, fill_plain, pack_row, plain_t, unpack_row
from pagealloc.kv.row_table cimport RowTable, access_t, check_access, row_place, table_t

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


def copy_tokens(RowTable table, uintptr_t window, const unsigned char[:, ::1] tokens):
    """memcpy every row of the tokens to its place in the window, and do nothing else.

    `tokens` are (T, bytes of L x 2 x H x D), of a uniform layout.  Returns nanoseconds.
    """
    cdef const table_t *layout = &table.table
    cdef int64_t row_bytes = layout.kinds[0].row_bytes
    cdef int64_t n_rows = 2 * layout.n_layers
    cdef int64_t token, i, start_ns
    cdef const unsigned char *source
    with nogil:
        start_ns = now_ns()
        for token in range(tokens.shape[0]):
            source = &tokens[token, 0]
            for i in range(n_rows):
                memcpy(
                    <char *>window + row_place(layout, &layout.kinds[i], token),
                    source + i * row_bytes, <size_t>row_bytes,
                )
        start_ns = now_ns() - start_ns
    return start_ns


def check_accesses(RowTable table, int64_t n_tokens, int64_t n_checks):
    """Resolve accesses to rows that differ each time; return nanoseconds, and a sum to keep it."""
    cdef const table_t *layout = &table.table
    cdef int64_t i, layer = 0, token = 0, total = 0, start_ns
    cdef access_t access
    with nogil:
        start_ns = now_ns()
        for i in range(n_checks):
            layer += 1
            if layer >= layout.n_layers:
                layer = 0
            token += 7
            if token >= n_tokens - 16:
                token -= n_tokens - 16
            total += check_access(layout, layer, token, token + 16, i & 1, n_tokens, &access)
            total += access.last_page - access.first_page
        start_ns = now_ns() - start_ns
    return start_ns, total


def count_tokens(RowTable table, int64_t n_tokens, int64_t n_checks):
    """The same loop without the check: what it takes by itself."""
    cdef const table_t *layout = &table.table
    cdef int64_t i, layer = 0, token = 0, total = 0, start_ns
    with nogil:
        start_ns = now_ns()
        for i in range(n_checks):
            layer += 1
            if layer >= layout.n_layers:
                layer = 0
            token += 7
            if token >= n_tokens - 16:
                token -= n_tokens - 16
            total += token ^ (layer << 20) ^ (i & 1)
        start_ns = now_ns() - start_ns
    return start_ns, total


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
