"""Filling a Py_buffer with plain bytes, for every class that exports memory."""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE

cdef extern from * nogil:
    """
    static char pagealloc_unsigned_bytes[] = "B";
    """
    char *UNSIGNED_BYTES "pagealloc_unsigned_bytes"


cdef inline int fill_buffer(
    Py_buffer *view, object owner, void *memory, Py_ssize_t nbytes, bint readonly, int flags
) except -1:
    """As PyBuffer_FillInfo, which would leak the reference that Cython puts into ``view.obj``."""
    if readonly and flags & PyBUF_WRITABLE:
        raise BufferError("this memory is read-only")
    view.buf = memory
    view.len = nbytes
    view.itemsize = 1
    view.readonly = readonly
    view.ndim = 1
    view.format = UNSIGNED_BYTES if flags & PyBUF_FORMAT else NULL
    view.shape = &view.len if flags & PyBUF_ND == PyBUF_ND else NULL
    view.strides = &view.itemsize if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
    view.suboffsets = NULL
    view.internal = NULL
    view.obj = owner
    return 0
