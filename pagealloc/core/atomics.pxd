"""Compiler built-ins for atomic memory access (gcc and clang), by operand type.

The GIL protects nothing below the Buffer: whatever two threads may touch without a common mutex
goes through these.  `bump` is for a counter that one thread writes and others read: no locked
instruction, which on the fast path would cost more than the allocation.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline int64_t pagealloc_add_i64(int64_t *target, int64_t value)
    { return __atomic_add_fetch(target, value, __ATOMIC_ACQ_REL); }
    static inline int64_t pagealloc_load_i64(const int64_t *target)
    { return __atomic_load_n(target, __ATOMIC_ACQUIRE); }
    static inline void pagealloc_store_i64(int64_t *target, int64_t value)
    { __atomic_store_n(target, value, __ATOMIC_RELEASE); }
    static inline void pagealloc_bump_i64(int64_t *target)
    { __atomic_store_n(target, __atomic_load_n(target, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED); }
    static inline uint32_t pagealloc_load_u32(const uint32_t *target)
    { return __atomic_load_n(target, __ATOMIC_RELAXED); }
    static inline void pagealloc_store_u32(uint32_t *target, uint32_t value)
    { __atomic_store_n(target, value, __ATOMIC_RELAXED); }
    static inline uint16_t pagealloc_load_u16(const uint16_t *target)
    { return __atomic_load_n(target, __ATOMIC_ACQUIRE); }
    static inline void pagealloc_store_u16(uint16_t *target, uint16_t value)
    { __atomic_store_n(target, value, __ATOMIC_RELEASE); }
    static inline int pagealloc_swap_u16(uint16_t *target, uint16_t from, uint16_t to)
    {
        return __atomic_compare_exchange_n(
            target, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }
    static inline void *pagealloc_load_ptr(void *const *target)
    { return __atomic_load_n(target, __ATOMIC_ACQUIRE); }
    static inline void pagealloc_store_ptr(void **target, void *value)
    { __atomic_store_n(target, value, __ATOMIC_RELEASE); }
    """
    int64_t atomic_add_i64 "pagealloc_add_i64"(int64_t *target, int64_t value)
    int64_t atomic_load_i64 "pagealloc_load_i64"(const int64_t *target)
    void atomic_store_i64 "pagealloc_store_i64"(int64_t *target, int64_t value)
    void atomic_bump_i64 "pagealloc_bump_i64"(int64_t *target)
    uint32_t atomic_load_u32 "pagealloc_load_u32"(const uint32_t *target)
    void atomic_store_u32 "pagealloc_store_u32"(uint32_t *target, uint32_t value)
    uint16_t atomic_load_u16 "pagealloc_load_u16"(const uint16_t *target)
    void atomic_store_u16 "pagealloc_store_u16"(uint16_t *target, uint16_t value)
    bint atomic_swap_u16 "pagealloc_swap_u16"(uint16_t *target, uint16_t old, uint16_t new)
    void *atomic_load_ptr "pagealloc_load_ptr"(void **target)
    void atomic_store_ptr "pagealloc_store_ptr"(void **target, void *value)
