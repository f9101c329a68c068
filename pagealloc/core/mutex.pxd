"""POSIX mutexes, for nogil code."""

cdef extern from "<pthread.h>" nogil:
    ctypedef struct mutex_t "pthread_mutex_t":
        pass
    int mutex_init "pthread_mutex_init"(mutex_t *mutex, const void *attributes)
    int mutex_destroy "pthread_mutex_destroy"(mutex_t *mutex)
    int mutex_lock "pthread_mutex_lock"(mutex_t *mutex)
    int mutex_unlock "pthread_mutex_unlock"(mutex_t *mutex)
    int mutex_trylock "pthread_mutex_trylock"(mutex_t *mutex)
