"""A process under load that serves its metrics; started by tests/servers as a program.

It writes a line of JSON to stdout when it serves, {"port": ...}.  At the first line on stdin the
load ends, and it writes what it counted itself; it goes on serving until stdin ends.
"""

import json
import sys
import threading
import time

import numpy as np

import pagealloc.observe
from pagealloc import LatencyHistogram, PageAllocator, page_size_bytes
from pagealloc.kv import KVCache, KVLayout
from pagealloc.observe import take_snapshot

N_THREADS = 2
LONGEST_PAUSE_S = 1e-3


def allocate_and_free(allocator, stop, seed):
    """Keep up to 100 blocks of mixed sizes, from 16 bytes to 64 pages."""
    rng = np.random.default_rng(seed)
    largest = 64 * page_size_bytes()
    kept = []
    while not stop.is_set():
        sizes = np.exp(rng.uniform(np.log(16), np.log(largest), 500)).astype(int).tolist()
        for nbytes in sizes:
            kept.append(allocator.alloc(nbytes))
            if len(kept) >= 100:
                kept.pop(0).close()
        time.sleep(rng.uniform(0, LONGEST_PAUSE_S))
    for block in kept:
        block.close()


def open_and_close(stop):
    """Use an allocator for a moment, and the next, for a size that nobody else asks for."""
    nbytes = 256 * page_size_bytes()
    while not stop.is_set():
        with PageAllocator(time_every=1) as allocator:
            for _ in range(100):
                allocator.alloc(nbytes).close()
            stop.wait(0.7)


def converse(cache, stop):
    """Publish prompts, and begin others with them."""
    layout = cache.layout
    row = np.ones((layout.n_layers, 2, layout.n_kv_heads, layout.head_dim), np.float16)
    prompt = 0
    while not stop.is_set():
        prompt += 1
        tokens = [prompt % 10] * 32
        with cache.sequence(tokens) as sequence:
            for _ in range(len(sequence), len(tokens)):
                sequence.append_token(row)
            sequence.publish()
        stop.wait(0.01)


def main():
    """Be the process."""
    stop = threading.Event()
    allocator = PageAllocator(time_every=1)
    cache = KVCache(KVLayout(2, 2, 64, 64, block_tokens=16))
    server, _ = pagealloc.observe.start_http_server(0)
    threads = [
        *(
            threading.Thread(target=allocate_and_free, args=(allocator, stop, seed))
            for seed in range(N_THREADS)
        ),
        threading.Thread(target=open_and_close, args=(stop,)),
        threading.Thread(target=converse, args=(cache, stop)),
    ]
    for thread in threads:
        thread.start()
    print(json.dumps({"port": server.server_port}), flush=True)
    sys.stdin.readline()
    stop.set()
    for thread in threads:
        thread.join()
    stats, kv, prefixes = allocator.stats(), cache.stats(), cache.prefixes.stats()
    latencies = LatencyHistogram.total(allocator.latencies())
    name = take_snapshot().allocators[0].name  # it was made first
    counted = {
        f'pagealloc_allocs_total{{allocator="{name}"}}': stats.n_allocs,
        f'pagealloc_frees_total{{allocator="{name}"}}': stats.n_frees,
        f'pagealloc_live_blocks{{allocator="{name}"}}': stats.n_live,
        'pagealloc_kv_sequences{cache="0"}': kv.n_sequences,
        'pagealloc_kv_file_bytes{cache="0"}': kv.file_bytes,
        'pagealloc_prefix_lookups_total{cache="0"}': prefixes.n_lookups,
        'pagealloc_prefix_hit_tokens_total{cache="0"}': prefixes.n_hit_tokens,
        'pagealloc_prefix_stored_blocks_total{cache="0"}': prefixes.n_stored_blocks,
    }
    print(
        json.dumps(
            {
                "counted": counted,
                "n_samples": latencies.n_samples,
                "p99_ns": latencies.percentile_ns(99),
            }
        ),
        flush=True,
    )
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
