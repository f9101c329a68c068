"""kill -9 amid a save: the file is the old one or the new one, whole."""

import os
import random
import signal
import time

from prefixes import assert_rows, compute, layout_of

from pagealloc.kv import KVCache

GENERATIONS = ([[1] * 40, [2] * 8], [[3] * 24, [3] * 8 + [4] * 32, [5] * 16])


def save_for_ever(path, ready):
    """In a child: save one generation after the other."""
    caches = [KVCache(layout_of()), KVCache(layout_of())]
    for cache, prompts in zip(caches, GENERATIONS, strict=True):
        for prompt in prompts:
            with cache.sequence(prompt) as seq:
                compute(seq, prompt)
                seq.publish()
    os.write(ready, b"!")
    while True:
        for cache in caches:
            cache.save(path)


def generation_of(path):
    """Which generation the file is, every row of it compared."""
    with KVCache.load(path, layout_of()) as cache:
        found = []
        for prompts in GENERATIONS:
            n_found = 0
            for prompt in prompts:
                with cache.sequence(prompt) as seq:
                    assert_rows(seq, prompt[: seq.n_cached])
                    n_found += seq.n_cached
            found.append(n_found)
        cache.check()
    assert sorted([0, max(found)]) == sorted(found)
    generation = found.index(max(found))
    assert max(found) == sum(len(prompt) for prompt in GENERATIONS[generation])
    return generation


def test_killed_at_any_moment(tmp_path, duration_s):
    """Five hundred times, if ten minutes are given; some times otherwise."""
    path = tmp_path / "prompts.kv"
    end_s = time.monotonic() + duration_s
    seen, n_kills, n_left = set(), 0, 0
    while n_kills < 4 or (time.monotonic() < end_s and n_kills < 500):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(path, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        assert os.read(read_end, 1) == b"!"
        os.close(read_end)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        n_kills += 1
        leftovers = len(list(tmp_path.iterdir())) - path.exists()
        assert leftovers <= 1  # what an earlier one left, the next has removed
        n_left += leftovers
        if path.exists():
            seen.add(generation_of(path))
    print(f"{n_kills} kills, {n_left} left a file, generations {seen}")
    assert seen
