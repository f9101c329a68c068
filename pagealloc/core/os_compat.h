/* Constants and calls that older C libraries, or macOS, lack.
 *
 * Purpose: os_memory.pyx compiles wherever CPython does.  What the platform has not got fails at
 * run time with ENOSYS, which every caller handles as a refusal of the kernel's.
 */
#ifndef PAGEALLOC_OS_COMPAT_H
#define PAGEALLOC_OS_COMPAT_H

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/types.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif
#if !defined(MFD_ALLOW_SEALING) && defined(__linux__)
#define MFD_ALLOW_SEALING 0x0002U
#elif !defined(__linux__)
#define MFD_ALLOW_SEALING 0U
#endif
#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT 26
#endif
#if defined(__linux__) && !defined(MFD_HUGETLB)
#define MFD_HUGETLB 0x0004U
#elif !defined(__linux__)
#define MFD_HUGETLB 0U
#endif

#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Values of include/uapi/asm-generic/mman-common.h and linux/falloc.h, fixed by the kernel's ABI. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
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
static inline void *pagealloc_move_onto(void *from, size_t nbytes, void *to, size_t to_nbytes)
{
    return mremap(from, nbytes, to_nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, to);
}

/* Values of include/uapi/linux/mempolicy.h. */
#define PAGEALLOC_MPOL_PREFERRED 1
#define PAGEALLOC_MPOL_BIND 2
static inline int pagealloc_mbind(void *address, size_t nbytes, int mode, uint64_t nodes)
{
    unsigned long mask[2] = {(unsigned long)nodes, 0};
    return (int)syscall(SYS_mbind, address, nbytes, mode, mask, 65ul, 0);
}
/* The node each page lies on, or a negative errno value, of this process's own pages. */
static inline int pagealloc_pages_nodes(unsigned long n, void **pages, int *nodes)
{
    return (int)syscall(SYS_move_pages, 0, n, pages, NULL, nodes, 0);
}

/* PAGEMAP_SCAN of include/uapi/linux/fs.h, Linux 6.7: how much is mapped by huge pages. */
struct pagealloc_scan_region {
    uint64_t start, end, categories;
};
struct pagealloc_scan {
    uint64_t size, flags, start, end, walk_end, regions, n_regions, max_pages;
    uint64_t inverted, mask, any_mask, returned;
};
#define PAGEALLOC_PAGE_IS_HUGE (1 << 6)
#define PAGEALLOC_PAGEMAP_SCAN _IOWR('f', 16, struct pagealloc_scan)
static inline int64_t pagealloc_scan_huge(int fd, uint64_t start, uint64_t end)
{
    struct pagealloc_scan_region regions[64];
    struct pagealloc_scan scan = {sizeof scan, 0, start, end, 0, (uintptr_t)regions, 64, 0,
                                  0, PAGEALLOC_PAGE_IS_HUGE, 0, PAGEALLOC_PAGE_IS_HUGE};
    int64_t nbytes = 0;
    while (scan.start < end) {
        int n = ioctl(fd, PAGEALLOC_PAGEMAP_SCAN, &scan);
        if (n < 0)
            return -1;
        for (int i = 0; i < n; i++)
            nbytes += (int64_t)(regions[i].end - regions[i].start);
        scan.start = scan.walk_end;
    }
    return nbytes;
}
#else
static inline void *pagealloc_move_onto(void *from, size_t nbytes, void *to, size_t to_nbytes)
{
    (void)from, (void)nbytes, (void)to, (void)to_nbytes;
    errno = ENOSYS;
    return MAP_FAILED;
}
#define PAGEALLOC_MPOL_PREFERRED 1
#define PAGEALLOC_MPOL_BIND 2
static inline int pagealloc_mbind(void *address, size_t nbytes, int mode, uint64_t nodes)
{
    (void)address, (void)nbytes, (void)mode, (void)nodes;
    errno = ENOSYS;
    return -1;
}
static inline int pagealloc_pages_nodes(unsigned long n, void **pages, int *nodes)
{
    (void)n, (void)pages, (void)nodes;
    errno = ENOSYS;
    return -1;
}
static inline int64_t pagealloc_scan_huge(int fd, uint64_t start, uint64_t end)
{
    (void)fd, (void)start, (void)end;
    errno = ENOSYS;
    return -1;
}
#define PAGEALLOC_MEMBARRIER_PRIVATE_EXPEDITED 0
#define PAGEALLOC_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED 0
static inline int pagealloc_membarrier(int command)
{
    (void)command;
    errno = ENOSYS;
    return -1;
}
#define MADV_POPULATE_WRITE -1
#define MADV_COLD -1
#define MADV_GUARD_INSTALL -1
#define MADV_GUARD_REMOVE -1
#define MADV_WIPEONFORK -1
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

/* A condition that is waited for by a clock nobody sets. */
#include <pthread.h>
#include <signal.h>
static inline void pagealloc_condition_init(pthread_cond_t *condition)
{
#ifdef __linux__
    pthread_condattr_t attributes;
    if (pthread_condattr_init(&attributes) == 0) {
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        pthread_cond_init(condition, &attributes);
        pthread_condattr_destroy(&attributes);
        return;
    }
#endif
    pthread_cond_init(condition, NULL);
}
static inline void pagealloc_condition_wait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                            int64_t ns)
{
    struct timespec until;
#ifdef __linux__
    clock_gettime(CLOCK_MONOTONIC, &until);
#else
    clock_gettime(CLOCK_REALTIME, &until);
#endif
    until.tv_sec += ns / 1000000000;
    until.tv_nsec += ns % 1000000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_cond_timedwait(condition, mutex, &until);
}
/* A thread that no signal meets, that nobody joins, and that keeps no process from ending. */
static inline int pagealloc_thread_start(void *(*body)(void *), const char *name)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    int error = pthread_attr_init(&attributes);
    if (error)
        return error;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 512 * 1024);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the new thread inherits it */
    error = pthread_create(&thread, &attributes, body, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
#ifdef __linux__
    if (error == 0)
        pthread_setname_np(thread, name);
#endif
    (void)name;
    return error;
}

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
