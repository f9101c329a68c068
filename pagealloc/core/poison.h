/* Tells AddressSanitizer which slots are free.
 *
 * ASan knows malloc's memory, not mmap's: without these marks a use after free of a slot is
 * silent.  In a normal build both macros are nothing.
 */
#ifndef PAGEALLOC_POISON_H
#define PAGEALLOC_POISON_H

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define pagealloc_poison(address, nbytes) __asan_poison_memory_region((address), (nbytes))
#define pagealloc_unpoison(address, nbytes) __asan_unpoison_memory_region((address), (nbytes))
#define PAGEALLOC_HAS_POISON 1
#else
#define pagealloc_poison(address, nbytes) ((void)(address), (void)(nbytes))
#define pagealloc_unpoison(address, nbytes) ((void)(address), (void)(nbytes))
#define PAGEALLOC_HAS_POISON 0
#endif

#endif
