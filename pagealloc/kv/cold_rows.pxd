"""ColdRows, for rooms that read and write a sequence's rows."""

from libc.stdint cimport int64_t

from pagealloc.kv.quant cimport error_t
from pagealloc.kv.row_codecs cimport RowCodecs
from pagealloc.kv.row_copy cimport rows_t
from pagealloc.kv.row_table cimport kind_t
from pagealloc.kv.window_rows cimport WindowRows


cdef class ColdRows(WindowRows):
    cdef RowCodecs codecs
    cdef readonly int64_t residual_tokens
    cdef readonly int64_t step_tokens
    cdef error_t *errors        # 2 a layer

    cdef int64_t due(self, int64_t layer, int64_t n_tokens) noexcept nogil
    cdef void pack(
        self, char *window, int64_t layer, int64_t kv, int64_t token, const char *row
    ) noexcept nogil
    cdef void pack_recent(
        self, char *window, WindowRows recent, const char *ring, int64_t layer, int64_t start,
        int64_t end
    ) noexcept nogil
    cdef void pack_given(
        self, char *window, int64_t layer, int64_t kv, int64_t start, const rows_t *rows,
        const kind_t *kind, char *scratch
    ) noexcept nogil
