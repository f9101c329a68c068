"""The list of all extent stores of the process, for fork()."""

from pagealloc.core.extent_pages cimport store_t

cdef void registry_add(store_t *store) noexcept nogil
cdef void registry_remove(store_t *store) noexcept nogil
