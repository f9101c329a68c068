/* Where another thread of this process is in native code, asked of itself by a signal.
 *
 * One thread asks at a time:  IDLE -> a tid (asker) -> COPYING -> COPIED (that thread's handler)
 *                                       \-> IDLE (asker, tired of waiting)
 * Who is asked is the state itself, so a signal that comes late never answers for another thread.
 * The handler touches nothing but the state and the copy: it may come between any two instructions.
 */
#ifndef PAGEALLOC_THREAD_CAPTURE_H
#define PAGEALLOC_THREAD_CAPTURE_H

#include <errno.h>
#include <stdint.h>
#include <string.h>

enum { PAGEALLOC_CAPTURED_WORDS = 64 }; /* most return addresses of interest lie in 512 bytes */

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGEALLOC_COPIED = -2, PAGEALLOC_COPYING, PAGEALLOC_IDLE }; /* more: a tid */
enum { PAGEALLOC_LEAST_PAGE_BYTES = 4096 }; /* of any of these systems */

static int pagealloc_capture_state;
static uintptr_t pagealloc_capture[1 + PAGEALLOC_CAPTURED_WORDS]; /* pc, then from sp on */

static int pagealloc_capture_moves(int from, int to)
{
    return __atomic_compare_exchange_n(&pagealloc_capture_state, &from, to, 0, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define PAGEALLOC_UNCHECKED __attribute__((no_sanitize("address", "thread")))
#endif
#endif
#ifndef PAGEALLOC_UNCHECKED
#define PAGEALLOC_UNCHECKED __attribute__((no_sanitize_address, no_sanitize_thread))
#endif

/* Another frame's variables are copied on purpose. */
PAGEALLOC_UNCHECKED static void pagealloc_capture_handler(int signal, siginfo_t *info, void *context)
{
    const ucontext_t *interrupted = (const ucontext_t *)context;
    const volatile uintptr_t *sp;
    int n_words;
    int saved_errno = errno;
    (void)signal;
    (void)info;
    if (pagealloc_capture_moves((int)syscall(SYS_gettid), PAGEALLOC_COPYING)) {
#if defined(__x86_64__)
        pagealloc_capture[0] = (uintptr_t)interrupted->uc_mcontext.gregs[REG_RIP];
        sp = (const volatile uintptr_t *)interrupted->uc_mcontext.gregs[REG_RSP];
#else
        pagealloc_capture[0] = (uintptr_t)interrupted->uc_mcontext.pc;
        sp = (const volatile uintptr_t *)interrupted->uc_mcontext.sp;
#endif
        /* Not beyond the page: a coroutine's stack may end there, with nothing mapped above. */
        n_words = (int)((PAGEALLOC_LEAST_PAGE_BYTES - (uintptr_t)sp % PAGEALLOC_LEAST_PAGE_BYTES)
                        / sizeof *sp);
        for (int i = 0; i < PAGEALLOC_CAPTURED_WORDS; i++)
            pagealloc_capture[1 + i] = i < n_words ? sp[i] : 0;
        __atomic_store_n(&pagealloc_capture_state, PAGEALLOC_COPIED, __ATOMIC_RELEASE);
    }
    errno = saved_errno;
}

static int pagealloc_capture_is_installed(void)
{
    struct sigaction now;
    return sigaction(SIGPROF, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO)
           && now.sa_sigaction == pagealloc_capture_handler;
}

/* 0, or an errno value; EBUSY: somebody else handles SIGPROF.  It is never uninstalled: a signal
 * that comes late would end the process. */
static int pagealloc_capture_install(void)
{
    struct sigaction old, wanted;
    if (sigaction(SIGPROF, NULL, &old) != 0)
        return errno;
    if (pagealloc_capture_is_installed())
        return 0;
    if ((old.sa_flags & SA_SIGINFO) || (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN))
        return EBUSY;
    memset(&wanted, 0, sizeof wanted);
    wanted.sa_sigaction = pagealloc_capture_handler;
    wanted.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK; /* Go's stacks are too small */
    sigemptyset(&wanted.sa_mask);
    return sigaction(SIGPROF, &wanted, NULL) == 0 ? 0 : errno;
}

static void pagealloc_pause_ns(int64_t nanoseconds)
{
    struct timespec left = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

/* CPU time of a thread in ns, -1 if there is no such thread.  The number of its clock is the
 * kernel's: the thread's complement, three bits left, and CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED. */
static int64_t pagealloc_thread_cpu_ns(int tid)
{
    struct timespec spent;
    if (clock_gettime((clockid_t)((~(unsigned)tid << 3) | 6), &spent) != 0)
        return -1;
    return (int64_t)spent.tv_sec * 1000000000 + spent.tv_nsec;
}

/* Copies a thread's pc and the words from its stack pointer on; 0 if it does not answer in 2 ms, or
 * if the signal is another's by now: its default is to end the process. */
static int pagealloc_capture_thread(int tid, uintptr_t *words)
{
    int n_waits = 0;
    if (!pagealloc_capture_is_installed())
        return 0;
    __atomic_store_n(&pagealloc_capture_state, tid, __ATOMIC_RELEASE);
    if (syscall(SYS_tgkill, getpid(), tid, SIGPROF) == 0) {
        while (n_waits++ < 40
               && __atomic_load_n(&pagealloc_capture_state, __ATOMIC_ACQUIRE) != PAGEALLOC_COPIED)
            pagealloc_pause_ns(50000);
    }
    if (pagealloc_capture_moves(tid, PAGEALLOC_IDLE))
        return 0;
    while (!pagealloc_capture_moves(PAGEALLOC_COPIED, PAGEALLOC_IDLE))
        pagealloc_pause_ns(50000);
    memcpy(words, pagealloc_capture, sizeof pagealloc_capture);
    return 1;
}

#else /* other systems: a profile without native code, and without CPU time by thread */

static int pagealloc_capture_install(void) { return ENOSYS; }
static void pagealloc_pause_ns(int64_t nanoseconds) { (void)nanoseconds; }
static int64_t pagealloc_thread_cpu_ns(int tid) { (void)tid; return -1; }
static int pagealloc_capture_thread(int tid, uintptr_t *words)
{
    (void)tid;
    (void)words;
    return 0;
}

#endif
#endif
