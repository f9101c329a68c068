/* The measured loops, written once and compiled twice.
 *
 * Purpose: time the same work on malloc (an executable, whatever library is preloaded) and on
 *     pagealloc (a shared library with -DBENCH_OURS, loaded by bench/worker.py), so that both
 *     differ in two calls only: take and give, in blocks.h.
 * Structure: blocks.h -> pairs.h, churn.h, retained.h: the works -> serve(): a command a line on
 *     stdin, a line of JSON on stdout.  A work first warms up, then measures, then frees everything
 *     it has; only the three of retained.h are parts of one.
 * Locking: none.
 * Units: nanoseconds, bytes.
 */
#include "churn.h" /* first: it may include Python.h */
#include "pairs.h"
#include "retained.h"
#include <dlfcn.h>
#include <gnu/libc-version.h>
#include <stdio.h>
#include <unistd.h>

/* --- commands --- */

static void print_result(result r)
{
    if (r.ns < 0)
        puts("{\"error\": \"the allocator refused a block\"}");
    else
        printf("{\"ns\": %.3f, \"n\": %lld, \"faults\": %lld}\n", r.ns, (long long)r.n,
               (long long)r.faults);
}

static void print_percentiles(int failed, samples *s, bool with_bins)
{
    if (failed) {
        puts("{\"error\": \"the allocator refused a block, or there are too many samples\"}");
        return;
    }
    printf("{\"n\": %llu, \"p50\": %u, \"p99\": %u, \"p999\": %u, \"max\": %u",
           (unsigned long long)s->n, samples_percentile(s, 0.5), samples_percentile(s, 0.99),
           samples_percentile(s, 0.999), samples_percentile(s, 1));
    if (with_bins) {
        uint64_t bins[MAX_BINS];
        const char *separator = "";
        samples_bins(s, bins);
        printf(", \"bins_per_octave\": %d, \"bins\": {", BINS_PER_OCTAVE);
        for (int i = 0; i < MAX_BINS; i++)
            if (bins[i]) {
                printf("%s\"%d\": %llu", separator, i, (unsigned long long)bins[i]);
                separator = ", ";
            }
        printf("}");
    }
    puts("}");
}

/* Whose posix_memalign answers, and which version it says it is. */
static void print_identity(void)
{
    Dl_info info = {0};
    const char *version = gnu_get_libc_version();
    static char number[32];
    void *symbol = dlsym(RTLD_DEFAULT, "posix_memalign"), *found;
    dladdr(symbol, &info);
    if ((found = dlsym(RTLD_DEFAULT, "mi_version"))) {
        int n = ((int (*)(void))found)();  /* 209: 2.0.9 */
        snprintf(number, sizeof number, "%d.%d.%d", n / 100, n / 10 % 10, n % 10);
        version = number;
    } else if ((found = dlsym(RTLD_DEFAULT, "tc_version"))) {
        int major, minor;
        const char *patch;
        version = ((const char *(*)(int *, int *, const char **))found)(&major, &minor, &patch);
    } else if ((found = dlsym(RTLD_DEFAULT, "mallctl"))) {
        int (*ask)(const char *, void *, size_t *, void *, size_t) = found;
        size_t nbytes = sizeof version;
        ask("version", &version, &nbytes, NULL, 0);
    }
    const char *library = info.dli_fname ? info.dli_fname : "?";
    printf("{\"library\": \"%s\", \"version\": \"%s\"}\n", library, version);
}

static void answer(const char *work, long long a, long long b, long long c)
{
    size_t nbytes = (size_t)a;
    random_state = 0x9E3779B97F4A7C15ull; /* the same choices in every round, for everyone */
    if (strcmp(work, "hot") == 0)
        print_result(measure_hot(nbytes, (size_t)b, c));
    else if (strcmp(work, "hot_counted") == 0)
        print_result(hot_pairs(nbytes, (size_t)b, 1000) || counted_pairs(nbytes, (size_t)b, (int)c)
                         ? refused
                         : (result){0, c, 0});
    else if (strcmp(work, "random") == 0)
        print_result(measure_random(nbytes, (size_t)b, c));
    else if (strcmp(work, "kv") == 0)
        print_result(measure_kv(nbytes, b != 0, c));
    else if (strcmp(work, "cross") == 0)
        print_result(measure_cross(nbytes, c));
    else if (strcmp(work, "kv_latency") == 0)
        print_percentiles(measure_kv_latency(nbytes, (int)b), &kv_samples, false);
    else if (strcmp(work, "soak_window") == 0)
        print_percentiles(soak_window(nbytes, (int)b, c), &window_samples, true);
    else if (strcmp(work, "soak_total") == 0)
        print_percentiles(!run_samples.counts, &run_samples, false);
    else if (strcmp(work, "retain") == 0)
        print_result(retain(nbytes, (int)b) ? refused : (result){0, b, 0});
    else if (strcmp(work, "release") == 0)
        print_result((release(), (result){0}));
    else if (strcmp(work, "retire") == 0)
        print_result((retire(), (result){0}));
    else if (strcmp(work, "identity") == 0)
        print_identity();
    else
        puts("{\"error\": \"no such work\"}");
}

/* Commands until stdin ends: WORK and three numbers, 0 where a work has no use for one. */
__attribute__((visibility("default"))) int bench_serve(void)
{
    static char buffer[1 << 14], line[256], work[32];
    long long a, b, c;
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%31s %lld %lld %lld", work, &a, &b, &c) == 4)
            answer(work, a, b, c);
        else
            puts("{\"error\": \"a command is a word and three numbers\"}");
        fflush(stdout);
    }
    return 0;
}

#ifdef BENCH_OURS
/* With the GIL.  0, or -1 with an exception. */
__attribute__((visibility("default"))) int bench_bind(PyObject *allocator)
{
    api = pagealloc_import();
    if (api == NULL)
        return -1;
    heap = api->heap_of(allocator);
    return heap == NULL ? -1 : 0;
}
#else
int main(void)
{
    return bench_serve();
}
#endif
