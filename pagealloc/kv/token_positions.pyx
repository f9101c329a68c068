"""TokenPositions: where each token of a sequence stands in its conversation.

Purpose
    A position for every token, which stays when tokens before it go, as llama.cpp has them.
Structure
    An array that grows; a layer that is behind the others gets the positions its tokens have there.
Invariants
    n_tokens <= capacity;  largest == max(positions), -1 without tokens
Locking
    None: the sequence's one writer.
Units
    Tokens.
"""

cimport cython
cimport numpy as np
from cpython.number cimport PyNumber_Index
from libc.stdint cimport INT32_MAX, int32_t, int64_t
from libc.stdlib cimport free, realloc

np.import_array()


@cython.final
@cython.auto_pickle(False)
cdef class TokenPositions:
    """The positions of one sequence."""

    def __cinit__(self):
        self.largest = -1

    def __dealloc__(self):
        free(self.positions)

    cdef int64_t first_of(self, int64_t start, int64_t end, object position) except -1:
        """Position of the first token that is new if tokens [start, end) come; or refuse.

        `position` is what was asked for token `start`; None: behind the largest.  Makes room for
        all of them, so that `add` cannot fail.
        """
        cdef int64_t first = self.largest + 1
        cdef int64_t i
        if position is not None:
            first = PyNumber_Index(position)
            if first < 0:
                raise ValueError(f"position={first}: must not be negative")
            for i in range(start, min(end, self.n_tokens)):
                if self.positions[i] != first + i - start:
                    raise ValueError(
                        f"position={first}: other layers have token {i} at position "
                        f"{self.positions[i]}, not {first + i - start}"
                    )
            first += max(0, self.n_tokens - start)
        if first > INT32_MAX - (end - start):
            raise ValueError(f"position {first + end - start} is too large: at most {INT32_MAX}")
        self.reserve(end)
        return first

    cdef void add(self, int64_t end, int64_t first) noexcept:
        """Have `end` tokens; the new ones stand at `first` and behind it."""
        cdef int64_t i, n_before = self.n_tokens
        for i in range(n_before, end):
            self.positions[i] = <int32_t>(first + i - n_before)
        if end > n_before:
            self.n_tokens = end
            self.largest = max(self.largest, first + end - n_before - 1)

    cdef int reserve(self, int64_t n_tokens) except -1:
        cdef int64_t capacity = max(64, self.capacity)
        cdef int32_t *positions
        if n_tokens <= self.capacity:
            return 0
        while capacity < n_tokens:
            capacity *= 2
        positions = <int32_t *>realloc(self.positions, <size_t>capacity * sizeof(int32_t))
        if positions == NULL:
            raise MemoryError("no memory for the positions of a sequence's tokens")
        self.positions = positions
        self.capacity = capacity
        return 0

    cdef int64_t smallest(self) noexcept:
        """The smallest position, -1 without tokens."""
        cdef int64_t i, found = self.largest
        for i in range(self.n_tokens):
            found = min(found, self.positions[i])
        return found

    cdef object as_array(self):
        """A copy, int32."""
        cdef np.npy_intp n_tokens = self.n_tokens
        cdef np.ndarray copy = np.PyArray_EMPTY(1, &n_tokens, np.NPY_INT32, 0)
        cdef int32_t *target = <int32_t *>np.PyArray_DATA(copy)
        cdef int64_t i
        for i in range(self.n_tokens):
            target[i] = self.positions[i]
        return copy

    cdef int replace(self, object positions) except -1:
        """Have other positions, as many as there are; int32."""
        cdef np.ndarray given = np.PyArray_FROMANY(
            positions, np.NPY_INT32, 1, 1, np.NPY_ARRAY_CARRAY
        )
        cdef int64_t i, n_tokens = np.PyArray_DIM(given, 0)
        self.reserve(n_tokens)
        self.largest = -1
        for i in range(n_tokens):
            self.positions[i] = (<int32_t *>np.PyArray_DATA(given))[i]
            self.largest = max(self.largest, self.positions[i])
        self.n_tokens = n_tokens
        return 0
