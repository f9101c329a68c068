/* Constants and calls that older C libraries, or macOS, lack.
 *
 * Purpose: os_memory.pyx compiles wherever CPython does.  What the platform has not got fails at
 * run time with ENOSYS, which every caller handles as a refusal of the kernel's.
 */
#ifndef PAGEALLOC_OS_COMPAT_H
#define PAGEALLOC_OS_COMPAT_H

#include <errno.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/types.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif
#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT 26
#endif

#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Values of include/uapi/asm-generic/mman-common.h and linux/falloc.h, fixed by the kernel's ABI. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef FALLOC_FL_KEEP_SIZE
#define FALLOC_FL_KEEP_SIZE 0x01
#define FALLOC_FL_PUNCH_HOLE 0x02
#endif
#define PAGEALLOC_MINCORE_VEC unsigned char
/* Values of include/uapi/linux/membarrier.h. */
#define PAGEALLOC_MEMBARRIER_PRIVATE_EXPEDITED (1 << 3)
#define PAGEALLOC_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED (1 << 4)
static inline int pagealloc_membarrier(int command)
{
    return (int)syscall(SYS_membarrier, command, 0, 0);
}
static inline int pagealloc_getcpu(unsigned *cpu, unsigned *node)
{
#if defined(__GLIBC_PREREQ)
#if __GLIBC_PREREQ(2, 29)
    return getcpu(cpu, node); /* without entering the kernel */
#endif
#endif
    return (int)syscall(SYS_getcpu, cpu, node, NULL);
}
#else
#define PAGEALLOC_MEMBARRIER_PRIVATE_EXPEDITED 0
#define PAGEALLOC_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED 0
static inline int pagealloc_membarrier(int command)
{
    (void)command;
    errno = ENOSYS;
    return -1;
}
#define MADV_POPULATE_WRITE -1
#define MADV_HUGEPAGE -1
#define MADV_NOHUGEPAGE -1
#define MADV_DONTDUMP -1
#define MADV_COLLAPSE -1
#define MAP_HUGETLB 0
#define MFD_CLOEXEC 0
#define FALLOC_FL_KEEP_SIZE 0
#define FALLOC_FL_PUNCH_HOLE 0
#define PAGEALLOC_MINCORE_VEC char
static inline int memfd_create(const char *name, unsigned flags)
{
    (void)name, (void)flags;
    errno = ENOSYS;
    return -1;
}
static inline int fallocate(int fd, int mode, off_t offset, off_t nbytes)
{
    (void)fd, (void)mode, (void)offset, (void)nbytes;
    errno = ENOSYS;
    return -1;
}
static inline int pagealloc_getcpu(unsigned *cpu, unsigned *node)
{
    (void)cpu, (void)node;
    errno = ENOSYS;
    return -1;
}
#endif

static inline void pagealloc_set_errno(int error)
{
    errno = error;
}

/* A clock for "is it time yet": right to some milliseconds, and four times as cheap to read. */
#ifdef CLOCK_MONOTONIC_COARSE
#define PAGEALLOC_CLOCK_COARSE CLOCK_MONOTONIC_COARSE
#else
#define PAGEALLOC_CLOCK_COARSE CLOCK_MONOTONIC
#endif

/* The thread waited for needs a few nanoseconds, unless it was preempted: then it needs the core. */
static inline void pagealloc_wait_briefly(int n_waits)
{
    const struct timespec pause = {0, 50000};
    if (n_waits < 64)
        sched_yield();
    else
        nanosleep(&pause, NULL);
}

#endif
