/* The C half of test_native_threads.py: what runs here runs without the GIL. */

#include "native_blocks.h"
#include "native_churn.h"
#include "native_races.h"

/* The heap of `allocator` and a place for failures; false with an exception. */
static bool begin_trial(trial *trial, PyObject *allocator)
{
    trial->heap = api->heap_of(allocator);
    return trial->heap != NULL && pthread_mutex_init(&trial->failure_mutex, NULL) == 0;
}

/* True if nothing went wrong; else the first failure is an AssertionError. */
static bool end_trial(trial *trial)
{
    pthread_mutex_destroy(&trial->failure_mutex);
    if (trial->failed) {
        PyErr_SetString(PyExc_AssertionError, trial->failure);
    }
    return !trial->failed;
}

static PyObject *py_churn(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"allocator", "seconds",    "n_threads", "n_short",
                            "max_bytes", "held_bytes", "seed",      NULL};
    churn churn = {.n_threads = 4};
    PyObject *allocator;
    Py_ssize_t max_bytes = 4 << 20, held_bytes = 16 << 20;
    unsigned long long seed = 0;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(
            args, keywords, "Od|$llnnK", names, &allocator, &churn.seconds, &churn.n_threads,
            &churn.n_short, &max_bytes, &held_bytes, &seed
        )
        || !begin_trial(&churn.trial, allocator)) {
        return NULL;
    }
    churn.max_bytes = (size_t)max_bytes;
    churn.held_bytes = (size_t)held_bytes;
    churn.seed = seed;
    Py_BEGIN_ALLOW_THREADS
    run_churn(&churn);
    Py_END_ALLOW_THREADS
    if (!end_trial(&churn.trial)) {
        return NULL;
    }
    return Py_BuildValue(
        "{s:L,s:L,s:L,s:L}", "n_threads", (long long)churn.n_started, "n_blocks",
        (long long)churn.n_blocks, "n_refused", (long long)churn.n_refused, "n_passed",
        (long long)churn.n_passed
    );
}

static PyObject *py_race(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"allocator", "seconds", "owner", "n_bystanders", "seed", NULL};
    race race = {.max_bytes = 64 << 10};
    PyObject *allocator;
    unsigned long long seed = 0;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(
            args, keywords, "Odi|$lK", names, &allocator, &race.seconds, &race.owner_role,
            &race.n_bystanders, &seed
        )
        || !begin_trial(&race.trial, allocator)) {
        return NULL;
    }
    race.n_racers = 2 + (race.owner_role == OWNER_WATCHES); /* two free: on two cores, at once */
    race.seed = seed;
    Py_BEGIN_ALLOW_THREADS
    run_race(&race);
    Py_END_ALLOW_THREADS
    if (!end_trial(&race.trial)) {
        return NULL;
    }
    return Py_BuildValue(
        "{s:L,s:L}", "n_raced", race.n_raced, "n_told_freed", race.n_told_freed
    );
}

/* --- blocks that a test holds, as bytes: an array of `block` --- */

static PyObject *py_hold(PyObject *module, PyObject *args)
{
    trial trial = {0};
    PyObject *allocator, *records;
    block *blocks;
    Py_ssize_t n, max_bytes;
    unsigned long long seed;
    uint64_t random;
    (void)module;
    if (!PyArg_ParseTuple(args, "OnnK", &allocator, &n, &max_bytes, &seed)
        || !begin_trial(&trial, allocator)) {
        return NULL;
    }
    records = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof *blocks);
    if (records == NULL) {
        return NULL;
    }
    blocks = (block *)PyBytes_AS_STRING(records);
    random = seeded(seed, 0);
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n; i++) {
        size_t align_bytes, nbytes = choose_nbytes(&random, (size_t)max_bytes, &align_bytes);
        if (!allocate(&trial, &blocks[i], nbytes, align_bytes, seed << 32 | (uint64_t)i)) {
            fail(&trial, "refused", &blocks[i], 0);
        }
    }
    Py_END_ALLOW_THREADS
    if (!end_trial(&trial)) {
        Py_CLEAR(records);
    }
    return records;
}

enum { VERIFY, RELEASE, FREE_AGAIN };

/* Do one of these to each block; how many the last one freed. */
static PyObject *each(PyObject *args, int what)
{
    trial trial = {0};
    PyObject *allocator;
    Py_buffer records;
    const block *blocks;
    long long n_freed = 0;
    if (!PyArg_ParseTuple(args, "Oy*", &allocator, &records)) {
        return NULL;
    }
    if (!begin_trial(&trial, allocator)) {
        PyBuffer_Release(&records);
        return NULL;
    }
    blocks = records.buf;
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < (size_t)records.len / sizeof *blocks; i++) {
        if (what == VERIFY) {
            verify(&trial, &blocks[i]);
        } else if (what == RELEASE) {
            release(&trial, &blocks[i]);
        } else {
            n_freed += api->free(trial.heap, blocks[i].address) == PAGEALLOC_FREED;
            n_freed += (long long)api->free_many(trial.heap, (void *const *)&blocks[i].address, 1);
        }
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&records);
    return end_trial(&trial) ? PyLong_FromLongLong(n_freed) : NULL;
}

static PyObject *py_verify(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, VERIFY);
}

static PyObject *py_release(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, RELEASE);
}

static PyObject *py_free_again(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, FREE_AGAIN);
}

static PyMethodDef methods[] = {
    {"churn", (PyCFunction)(void (*)(void))py_churn, METH_VARARGS | METH_KEYWORDS, NULL},
    {"race", (PyCFunction)(void (*)(void))py_race, METH_VARARGS | METH_KEYWORDS, NULL},
    {"hold", py_hold, METH_VARARGS, NULL},
    {"verify", py_verify, METH_VARARGS, NULL},
    {"release", py_release, METH_VARARGS, NULL},
    {"free_again", py_free_again, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "native_churn", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit_native_churn(void)
{
    api = pagealloc_import();
    if (api == NULL) {
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL
        && (PyModule_AddIntMacro(module, OWNER_RACES) || PyModule_AddIntMacro(module, OWNER_WATCHES)
            || PyModule_AddIntMacro(module, OWNER_IS_DEAD))) {
        Py_CLEAR(module);
    }
    return module;
}
