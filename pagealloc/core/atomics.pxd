"""Compiler built-ins for atomic memory access (gcc and clang), by operand type.

The GIL protects nothing below the Buffer: whatever two threads may touch without a common mutex
goes through these.
"""

from libc.stdint cimport int64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline int64_t pagealloc_add_i64(int64_t *target, int64_t value)
    { return __atomic_add_fetch(target, value, __ATOMIC_RELAXED); }
    static inline int64_t pagealloc_load_i64(const int64_t *target)
    { return __atomic_load_n(target, __ATOMIC_RELAXED); }
    static inline void *pagealloc_load_ptr(void *const *target)
    { return __atomic_load_n(target, __ATOMIC_ACQUIRE); }
    static inline void pagealloc_store_ptr(void **target, void *value)
    { __atomic_store_n(target, value, __ATOMIC_RELEASE); }
    """
    int64_t atomic_add_i64 "pagealloc_add_i64"(int64_t *target, int64_t value)
    int64_t atomic_load_i64 "pagealloc_load_i64"(const int64_t *target)
    void *atomic_load_ptr "pagealloc_load_ptr"(void **target)
    void atomic_store_ptr "pagealloc_store_ptr"(void **target, void *value)
