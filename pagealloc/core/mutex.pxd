"""POSIX mutexes, for nogil code."""

cdef extern from "<pthread.h>" nogil:
    """
    /* All are held briefly: where the C library can, who finds one taken spins for a moment before
     * the kernel puts it to sleep, which would cost both sides a hundred times the wait. */
    static inline void pagealloc_mutex_init(pthread_mutex_t *mutex)
    {
    #ifdef PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP
        pthread_mutexattr_t attributes;
        if (pthread_mutexattr_init(&attributes) == 0) {
            pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
            pthread_mutex_init(mutex, &attributes);
            pthread_mutexattr_destroy(&attributes);
            return;
        }
    #endif
        pthread_mutex_init(mutex, NULL);
    }
    """
    ctypedef struct mutex_t "pthread_mutex_t":
        pass
    void mutex_init "pagealloc_mutex_init"(mutex_t *mutex)
    int mutex_destroy "pthread_mutex_destroy"(mutex_t *mutex)
    int mutex_lock "pthread_mutex_lock"(mutex_t *mutex)
    int mutex_unlock "pthread_mutex_unlock"(mutex_t *mutex)
    int mutex_trylock "pthread_mutex_trylock"(mutex_t *mutex)
