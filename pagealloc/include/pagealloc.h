/* pagealloc's C API: page-aligned memory for C and C++ code, without the GIL.
 *
 * Purpose
 *     Allocate from an allocator that a Python program made, in native code and in any thread.
 * Structure
 *     pagealloc_import()      -> the table of functions, behind a capsule; once, at module init
 *     table->heap_of(object)  -> the heap of one pagealloc.PageAllocator; with the GIL
 *     table->alloc(heap, ...) -> memory; with or without the GIL, in any thread
 * Invariants
 *     The table never changes and lives as long as the process.
 *     Within one PAGEALLOC_ABI_VERSION functions are only appended to the table, and no structure,
 *     signature or meaning of a code changes; whatever breaks that raises the version.
 * Locking
 *     Every function but heap_of is thread-safe and needs no GIL.  They may wait for other threads
 *     inside the allocator, and for the kernel; none of them waits for the GIL or calls Python, so
 *     they may be called with the GIL held, and in threads that Python does not know.
 *     Not safe in a signal handler.
 * Units
 *     Bytes in what is named nbytes or *_bytes, numbers of things in what is named n or n_*.
 *
 * Whose is what.  A heap belongs to its PageAllocator.  The caller keeps a reference to that object
 * for as long as it uses the heap, and sees to it that no thread is inside a function of the table,
 * or enters one, when the allocator is closed.  A block belongs to whoever called alloc, until
 * exactly one free, by any thread.  PageAllocator.close() raises BufferError while a block is live;
 * after a close() that succeeded the heap pointer is dangling.  A PageAllocator that is collected
 * while blocks are live leaves its memory to the process: the blocks stay readable, for good.
 * After fork() the child has copies of heaps and blocks, and uses them as its own.
 *
 * Mistakes.  A size, alignment or address that is none gives NULL, -1 or a code, and so does a heap
 * that is NULL.  Any other wrong heap pointer is undefined behaviour.
 */
#ifndef PAGEALLOC_H
#define PAGEALLOC_H

#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What this header describes; pagealloc_import() compares it with what is installed. */
#define PAGEALLOC_ABI_VERSION 1
#define PAGEALLOC_N_FUNCTIONS 7

/* What free answers. */
enum {
    PAGEALLOC_FREED = 0,
    PAGEALLOC_NOT_OURS = 1, /* no block of this heap starts there; nothing was changed */
    PAGEALLOC_NOT_LIVE = 2  /* a block that is free already; nothing was changed */
};

/* The allocator of one PageAllocator.  Opaque. */
typedef struct pagealloc_heap pagealloc_heap;

/* What a heap holds; the fields are read one after another, not in one instant. */
typedef struct pagealloc_stats {
    int64_t reserved_bytes;  /* address space */
    int64_t committed_bytes; /* what may be backed by memory; never above the budget */
    int64_t live_bytes;      /* of live blocks, each as long as its slot or pages */
    int64_t idle_bytes;      /* of free slots kept for the threads' next requests */
    int64_t n_live;          /* blocks, those of Python's Buffers included */
    int64_t n_allocs;        /* since the heap was made */
    int64_t n_frees;
    int64_t n_failed;        /* requests refused by the budget or the kernel */
} pagealloc_stats;

typedef struct pagealloc_api {
    uint32_t abi_version; /* PAGEALLOC_ABI_VERSION of the installed pagealloc */
    uint32_t n_functions; /* how many function pointers follow in the installed pagealloc */

    /* The heap of `allocator`, a pagealloc.PageAllocator.  A borrowed pointer, valid until the
     * allocator is closed or collected.  Needs the GIL.
     * NULL, with TypeError set: that is no allocator; with pagealloc.ClosedError: it is closed. */
    pagealloc_heap *(*heap_of)(PyObject *allocator);

    /* Memory of `nbytes`, from 1 to 2^47; its content is undefined.  It starts on a multiple of
     * `align_bytes`, a power of two of at most 1 GiB; 0: of a page for lengths from a page on, of
     * 64 bytes below.  The caller owns it, and gives it back with free or free_many.
     * NULL: the budget or the kernel refused, or an argument is none of these. */
    void *(*alloc)(pagealloc_heap *heap, size_t nbytes, size_t align_bytes);

    /* Give a block back: PAGEALLOC_FREED, or PAGEALLOC_NOT_OURS / PAGEALLOC_NOT_LIVE and nothing
     * was changed.  Of several threads that free the same block in the same instant more than one
     * may get PAGEALLOC_FREED, and it is freed once.  `address` may be anything, it is looked up and
     * never followed; NULL is not ours.  A code is a defect of the caller's, and no promise: the
     * address may have been handed out again since. */
    int (*free)(pagealloc_heap *heap, void *address);

    /* `n` blocks, as by alloc, into `addresses`, an array of the caller's with room for `n`.
     * 0: the caller owns `n` blocks, each to be freed by itself; `n` may be 0.
     * -1: refused as by alloc, or `addresses` is NULL; no block was allocated, and what
     * `addresses` holds then is undefined. */
    int (*alloc_many)(
        pagealloc_heap *heap, size_t nbytes, size_t align_bytes, size_t n, void **addresses
    );

    /* Free `n` blocks, of whatever sizes, in any order; `addresses` is only read.
     * Returns how many were freed: fewer than `n` if some would have got another answer from free.
     * Those were left alone, and the others were freed. */
    size_t (*free_many)(pagealloc_heap *heap, void *const *addresses, size_t n);

    /* How many bytes from `address` on the owner of the block may use: at least what was asked for.
     * 0: no live block of this heap starts there. */
    size_t (*usable_bytes)(pagealloc_heap *heap, const void *address);

    /* Fill `*stats`, the caller's; all zero if `heap` is NULL.  Takes every lock of the heap in
     * turn: microseconds, not nanoseconds. */
    void (*stats)(pagealloc_heap *heap, pagealloc_stats *stats);
} pagealloc_api;

/* The table of the installed pagealloc; call it once, in the module's initialisation.  Needs the
 * GIL.  NULL, with ImportError set: pagealloc is not installed, or is too old for this header, or
 * speaks another ABI version. */
static inline const pagealloc_api *pagealloc_import(void)
{
    const pagealloc_api *api;
    PyObject *module = PyImport_ImportModule("pagealloc.core.c_api");
    if (module == NULL) {
        return NULL;
    }
    Py_DECREF(module);
    api = (const pagealloc_api *)PyCapsule_Import("pagealloc.core.c_api.table", 0);
    if (api == NULL) {
        return NULL;
    }
    if (api->abi_version != PAGEALLOC_ABI_VERSION) {
        PyErr_Format(
            PyExc_ImportError,
            "this module was compiled for ABI version %u of pagealloc's C API, and the installed "
            "pagealloc has version %u: compile the module again, or install the pagealloc it was "
            "compiled with",
            (unsigned int)PAGEALLOC_ABI_VERSION, (unsigned int)api->abi_version
        );
        return NULL;
    }
    if (api->n_functions < PAGEALLOC_N_FUNCTIONS) {
        PyErr_Format(
            PyExc_ImportError,
            "this module was compiled for %u functions of pagealloc's C API, and the installed "
            "pagealloc has %u: install a pagealloc at least as new as the one it was compiled with",
            (unsigned int)PAGEALLOC_N_FUNCTIONS, (unsigned int)api->n_functions
        );
        return NULL;
    }
    return api;
}

#ifdef __cplusplus
}
#endif

#endif
