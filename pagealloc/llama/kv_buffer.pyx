"""KVBuffer: a buffer of llama.cpp's in memory of an allocator; and the hook that puts it there.

Purpose
    Let ``llama_init_from_model`` take its KV buffer from us, without a patch of llama.cpp.
Structure
    ::

        ggml_backend_cpu_buffer_type()   a static table of functions; its alloc_buffer is replaced
                                         while one thread makes one context
        ggml_backend_cpu_buffer_from_ptr()   what the replacement returns: a buffer over a region,
                                         whose own table says how to clear and to free it: by us
    Which slots of the tables are meant, `ggml_slots` learns by trying.
Invariants
    a region's memory goes back once llama.cpp has freed its buffer and no array shows it
    clearing with zeros writes nothing: pages that are not there read as zeros
Locking
    `lock` guards the list of regions.  The functions that ggml calls never take the GIL: the
    thread that has it may be waiting for them.
Units
    Bytes.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pagealloc cimport PageHeap, page_alloc, page_free, page_heap_of
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_file cimport os_map_file_private, os_map_zeros
from pagealloc.core.os_memory cimport (
    MADV_NOHUGEPAGE,
    os_advise,
    os_page_bytes,
    os_populate_write,
    os_purge,
    os_resident_bytes,
)
from pagealloc.llama.ggml_slots cimport (
    alloc_function,
    clear_function,
    find_slots,
    free_function,
    from_ptr_function,
    slots_t,
    type_function,
)

import os

from pagealloc.errors import ClosedError

cdef extern from "<pthread.h>" nogil:
    ctypedef struct thread_t "pthread_t":
        pass
    thread_t pthread_self()
    int pthread_equal(thread_t one, thread_t other)

cdef enum:
    LEAST_BYTES = 64 << 10      # smaller buffers are never KV

cdef struct region_t:
    region_t *next
    void *buffer                # ggml's
    PageHeap *heap              # NULL: its allocator is gone, the memory stays
    char *base
    size_t nbytes               # whole pages
    size_t asked_bytes
    int64_t n_clears
    int64_t n_views
    bint is_live                # ggml has not freed it
    bint is_lazy
    bint has_file               # pages of a file are mapped in it
    bint is_orphan              # no KVBuffer looks at it any more

cdef struct hook_t:
    thread_t thread
    PageHeap *heap
    alloc_function before
    from_ptr_function from_ptr
    slots_t slots
    bint is_lazy
    int64_t n_refused
    region_t *made

cdef mutex_t lock
cdef region_t *regions = NULL
cdef hook_t hook
mutex_init(&lock)


# ---------------------------------------------------------------------------------------------
# What ggml calls

cdef void *alloc_for_ggml(void *buffer_type, size_t nbytes) noexcept nogil:
    """Instead of ``alloc_buffer``."""
    cdef size_t page_bytes = os_page_bytes()
    cdef size_t whole_bytes = (nbytes + page_bytes - 1) // page_bytes * page_bytes
    cdef region_t *region
    cdef void **table
    cdef void *memory
    if nbytes < LEAST_BYTES or not pthread_equal(pthread_self(), hook.thread):
        return hook.before(buffer_type, nbytes)
    region = <region_t *>calloc(1, sizeof(region_t))
    memory = page_alloc(hook.heap, whole_bytes, page_bytes) if region != NULL else NULL
    if memory == NULL or os_purge(memory, whole_bytes) != 0:
        hook.n_refused += 1
        if memory != NULL:
            page_free(hook.heap, memory)
        free(region)
        return hook.before(buffer_type, nbytes)
    region.is_lazy = hook.is_lazy
    region.buffer = hook.from_ptr(memory, nbytes)
    region.heap, region.base, region.nbytes = hook.heap, <char *>memory, whole_bytes
    region.asked_bytes = nbytes
    region.is_live = True
    table = <void **>region.buffer
    table[hook.slots.clear] = <void *>clear_for_ggml
    table[hook.slots.free] = <void *>free_for_ggml
    mutex_lock(&lock)
    region.next = hook.made
    hook.made = region
    mutex_unlock(&lock)
    return region.buffer


cdef region_t *region_of(void *buffer) noexcept nogil:
    """The region of a buffer; the lock is held."""
    cdef region_t *region = hook.made
    while region != NULL:
        if region.buffer == buffer and region.is_live:
            return region
        region = region.next
    region = regions
    while region != NULL:
        if region.buffer == buffer and region.is_live:
            return region
        region = region.next
    return NULL


cdef void clear_for_ggml(void *buffer, uint8_t value) noexcept nogil:
    """Instead of ``clear``."""
    cdef region_t *region
    mutex_lock(&lock)
    region = region_of(buffer)
    mutex_unlock(&lock)
    if region == NULL:
        return
    region.n_clears += 1
    if region.n_clears == 1:    # KV, then, and no scratch; these are hints
        if region.is_lazy:
            os_advise(region.base, region.nbytes, MADV_NOHUGEPAGE)  # a row would bring 2 MiB
        else:
            os_populate_write(region.base, region.nbytes)
            if value == 0:
                return
    if value != 0 or make_zero(region) != 0:
        memset(region.base, value, region.asked_bytes)


cdef int make_zero(region_t *region) noexcept nogil:
    """Give all pages back, those of files included."""
    cdef int error = 0
    if region.has_file:
        error = os_map_zeros(region.base, region.nbytes)
        if error == 0:
            region.has_file = False
            os_advise(region.base, region.nbytes, MADV_NOHUGEPAGE)
        return error
    return os_purge(region.base, region.nbytes)


cdef void free_for_ggml(void *buffer) noexcept nogil:
    """Instead of ``free_buffer``."""
    cdef region_t *region
    mutex_lock(&lock)
    region = region_of(buffer)
    if region != NULL:
        region.is_live = False
        if region.n_views == 0:
            release(region)
        if region.is_orphan:
            unlink(region)
            free(region)
    mutex_unlock(&lock)


cdef void release(region_t *region) noexcept nogil:
    """Give a region's memory back, of which nobody will know; the lock is held.

    Pages of a file must go before: the allocator would hand them out.  If they cannot, the memory
    stays for good.
    """
    if region.base == NULL:
        return
    if region.has_file and os_map_zeros(region.base, region.nbytes) != 0:
        region.base = NULL
        return
    os_purge(region.base, region.nbytes)    # at once: nobody may want as much for long
    if region.heap != NULL:
        page_free(region.heap, region.base)
    region.base = NULL


# ---------------------------------------------------------------------------------------------
# The hook

cdef class BufferHook:
    """The hook on one library of ggml.

    Parameters
    ----------
    cpu_buffer_type, alloc_buffer, from_ptr, clear, free_buffer : int
        Addresses of ``ggml_backend_cpu_buffer_type``, ``ggml_backend_buft_alloc_buffer``,
        ``ggml_backend_cpu_buffer_from_ptr``, ``ggml_backend_buffer_clear`` and
        ``ggml_backend_buffer_free`` of the instance that llama.cpp uses.

    Raises
    ------
    LookupError
        ggml's tables are not as they were: nothing was changed.
    """

    cdef void **table
    cdef from_ptr_function from_ptr
    cdef slots_t found
    cdef object allocator

    def __cinit__(
        self, uintptr_t cpu_buffer_type, uintptr_t alloc_buffer, uintptr_t from_ptr,
        uintptr_t clear, uintptr_t free_buffer, is_writable,
    ):
        self.table = <void **>(<type_function>cpu_buffer_type)()
        if self.table == NULL or not is_writable(<uintptr_t>self.table):
            raise LookupError("ggml's table of CPU buffers cannot be written to")
        self.from_ptr = <from_ptr_function>from_ptr
        self.found = find_slots(
            self.table, <alloc_function>alloc_buffer, self.from_ptr, <clear_function>clear,
            <free_function>free_buffer,
        )
        if self.found.alloc < 0 or self.found.clear < 0 or self.found.free < 0:
            raise LookupError(
                f"ggml's tables are others: alloc_buffer, clear and free_buffer in slots "
                f"{self.found.alloc}, {self.found.clear} and {self.found.free}"
            )

    @property
    def slots(self) -> tuple:
        """In which slots ``alloc_buffer``, ``clear`` and ``free_buffer`` are."""
        return self.found.alloc, self.found.clear, self.found.free

    def __reduce__(self):
        raise TypeError("a hook on this process's ggml cannot be pickled")

    def install(self, allocator, *, is_lazy) -> None:
        """Take what the present thread has ggml allocate from now on; one hook at a time."""
        hook.heap = page_heap_of(allocator)
        self.allocator = allocator
        hook.from_ptr = self.from_ptr
        hook.slots = self.found
        hook.is_lazy, hook.n_refused, hook.made = is_lazy, 0, NULL
        hook.thread = pthread_self()
        hook.before = <alloc_function>self.table[self.found.alloc]
        self.table[self.found.alloc] = <void *>alloc_for_ggml

    def remove(self) -> tuple:
        """Take it away; return the buffers made meanwhile, and how many were refused."""
        cdef region_t *region
        cdef KVBuffer made
        self.table[self.found.alloc] = <void *>hook.before
        buffers = []
        mutex_lock(&lock)
        region = hook.made
        hook.made = NULL
        while region != NULL:
            made = KVBuffer.__new__(KVBuffer)
            made.region, made.allocator = region, self.allocator
            buffers.append(made)
            region = region.next
            link(made.region)
        mutex_unlock(&lock)
        self.allocator = None
        return buffers[::-1], hook.n_refused


cdef void link(region_t *region) noexcept nogil:
    global regions
    region.next = regions
    regions = region


cdef void unlink(region_t *region) noexcept nogil:
    global regions
    cdef region_t **at = &regions
    while at[0] != NULL and at[0] != region:
        at = &at[0].next
    if at[0] == region:
        at[0] = region.next


cdef class KVBuffer:
    """Memory that a buffer of llama.cpp's lies in; exports itself, read-only.

    Made by `BufferHook`.  Arrays over it keep the memory, also when the context is gone.
    """

    cdef region_t *region
    cdef object allocator

    def __dealloc__(self):
        cdef region_t *region = self.region
        if region == NULL:
            return
        mutex_lock(&lock)
        if region.is_live:
            region.is_orphan = True
            region.heap = NULL      # the allocator may be collected now, and the context goes on
        else:
            release(region)
            unlink(region)
            free(region)
        mutex_unlock(&lock)

    def __reduce__(self):
        raise TypeError("a buffer of llama.cpp's cannot be pickled: see KVMemory.prefix")

    cdef char *base(self) except NULL:
        if self.region.base == NULL or not self.region.is_live:
            raise ClosedError("the llama.cpp context of this KV memory was freed")
        return self.region.base

    @property
    def is_live(self) -> bool:
        """Whether llama.cpp has not freed it."""
        return self.region.is_live

    @property
    def n_clears(self) -> int:
        """How often llama.cpp cleared it; KV buffers are when they are made, scratch is not."""
        return self.region.n_clears

    @property
    def nbytes(self) -> int:
        """Its length, as llama.cpp asked for it."""
        return self.region.asked_bytes

    @property
    def address(self) -> int:
        """Where it begins, on a page."""
        return <uintptr_t>self.base()

    def resident_bytes(self, start=0, length=None) -> int:
        """Return the physical bytes behind some of its pages, those shared with others included."""
        length = self.region.nbytes - start if length is None else length
        self._check(start, length)
        cdef int64_t nbytes = os_resident_bytes(self.base() + <int64_t>start, <size_t>length)
        if nbytes < 0:
            raise OSError("the kernel does not say which pages are resident (mincore)")
        return nbytes

    def purge_all(self) -> None:
        """Give all pages back, which read as zeros from then on."""
        self.base()
        _raise_for(make_zero(self.region))

    def purge(self, start, nbytes) -> None:
        """Give pages back, which read as zeros, or as their file has them, from then on."""
        self._check(start, nbytes)
        _raise_for(os_purge(self.base() + <int64_t>start, <size_t>nbytes))

    def map_private(self, fd, start, nbytes) -> None:
        """Map a file's pages in the place of its own; whoever writes to one gets a copy."""
        self._check(start, nbytes)
        self.base()
        mutex_lock(&lock)
        self.region.has_file = True
        mutex_unlock(&lock)
        _raise_for(
            os_map_file_private(
                self.base() + <int64_t>start, <size_t>nbytes, <int>fd, <int64_t>start
            )
        )

    def _check(self, start, nbytes):
        if start < 0 or nbytes < 0 or start + nbytes > self.region.nbytes or (
            (start | nbytes) % os_page_bytes()
        ):
            raise ValueError(f"[{start}, {start + nbytes}) are no whole pages of this buffer")

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.base()
        mutex_lock(&lock)
        self.region.n_views += 1
        mutex_unlock(&lock)
        try:
            PyBuffer_FillInfo(buffer, self, self.region.base, self.region.asked_bytes, 1, flags)
        except BaseException:
            self._drop_view()
            raise

    def __releasebuffer__(self, Py_buffer *buffer):
        self._drop_view()

    def _drop_view(self):
        mutex_lock(&lock)
        self.region.n_views -= 1
        if self.region.n_views == 0 and not self.region.is_live:
            release(self.region)
        mutex_unlock(&lock)


def _raise_for(int error):
    if error:
        raise OSError(error, os.strerror(error))
